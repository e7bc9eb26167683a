"""Whether packages can be imported, tried in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .tensorrt_libraries import all_visible

IMPORT_TIMEOUT_S = 120


# Run in a child process: a package whose native library is broken may end the process that imports it. A line is
# printed before and after each import, so that the culprit is known.
PROBE = """
import importlib, json, sys
for names in json.loads(sys.argv[1]):
    print(json.dumps({"begin": names[0]}), flush=True)
    facts = {}
    for name in names:
        try:
            module = importlib.import_module(name)
        except BaseException as error:
            text = " ".join(str(error).split())
            text = text if len(text) <= 500 else text[:330] + " ... " + text[-160:]
            facts["error"] = f"{type(error).__name__}: {text}"
            continue
        facts = {"error": "", "version": str(getattr(module, "__version__", ""))}
        if name == "onnxruntime":
            facts["providers"] = module.get_available_providers()
        break
    print(json.dumps({"end": names[0], **facts}), flush=True)
"""


@dataclass(frozen=True)
class Imported:
    """What happened when a package was imported. error "" is success."""

    error: str
    version: str = ""
    providers: tuple[str, ...] = ()


def try_imports(modules: Iterable[tuple[str, ...]]) -> dict[str, Imported]:
    """Import modules in a child process; a tuple lists alternatives, the first that works counts. By first name."""
    pending, found = list(modules), {}
    while pending:
        lines, died = _probe(pending)
        running = ""
        for line in lines:
            if "begin" in line:
                running = line["begin"]
            else:
                running, name = "", line.pop("end")
                found[name] = Imported(line["error"], line.get("version", ""), tuple(line.get("providers", ())))
        if running:
            found[running] = Imported(f"importing it {died}")
        rest = [names for names in pending if names[0] not in found]
        if len(rest) == len(pending):  # the child itself does not run
            found.update((names[0], Imported(f"importing it {died}")) for names in rest)
            rest = []
        pending = rest
    return found


def _search_path() -> str:
    """Where the child imports from: as here, without the working directory, which `python -m` puts first. A file of
    the user that happens to be called like a package is neither it nor to be executed."""
    here = os.path.realpath(os.getcwd())
    return os.pathsep.join(path for path in sys.path if path and os.path.realpath(path) != here)


def _probe(modules: list[tuple[str, ...]]) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, "-P", "-c", PROBE, json.dumps(modules)]
    try:
        with all_visible() as environment:
            child = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False,
                                   stdin=subprocess.DEVNULL,
                                   env={**environment, "PYTHONPATH": _search_path()})
        output, died = child.stdout, f"ended the process with code {child.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        died = f"took more than {IMPORT_TIMEOUT_S} s"
    except OSError as error:
        output, died = "", f"failed: {error.strerror}"
    return [json.loads(line) for line in output.splitlines() if line.startswith(('{"begin"', '{"end"'))], died
