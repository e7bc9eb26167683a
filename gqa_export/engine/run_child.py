"""Runs the building process and turns whatever becomes of it into a result or one clear error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ..environment.tensorrt_libraries import Library, visible
from ..errors import GqaExportError
from ..progress import Progress
from .build_job import SEE_LOG, Built, Job
from .build_log import last_lines

MODULE = "gqa_export.engine.build_child"


class Refusal(NamedTuple):
    """A GqaExportError of the child, as it was sent."""

    what: str
    where: str
    fix: str
    code: str


def run_job(job: Job, library: Library, log: Path, report: Progress, module: str = MODULE) -> Built:
    """Build in a child process whose every printed line goes to `log`; the child is never left behind.

    Raises:
        GqaExportError: the child refuses, fails or is killed.
    """
    with visible(library) as environment, log.open("w", encoding="utf-8") as lines:
        # -P: the working directory of the user is no place to import from
        child = subprocess.Popen([sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=lines, text=True, env=_with_path(environment))
        try:
            return _listen(child, job, log, report)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()


def _with_path(environment: dict[str, str]) -> dict[str, str]:
    import os

    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _listen(child: subprocess.Popen[str], job: Job, log: Path, report: Progress) -> Built:
    assert child.stdin is not None
    assert child.stdout is not None
    result: dict[str, Any] | None = None
    try:
        child.stdin.write(job.to_json())
        child.stdin.close()
    except BrokenPipeError:
        pass  # it ended before it read: its messages are in the log
    for line in child.stdout:
        message = json.loads(line)
        if "progress" in message:
            report(*message["progress"])
        else:
            result = message
    code = child.wait()
    if result is not None and "refused" in result:
        refusal = Refusal(*result["refused"])
        message = refusal.what
        if refusal.fix in ("", SEE_LOG):
            lines = last_lines(log.read_text(encoding="utf-8", errors="replace"))
            message = f"{message}; TensorRT's messages:\n{_indented(lines)}"
        raise GqaExportError(message, refusal.where, refusal.fix or SEE_LOG, code=refusal.code)
    if code or result is None:
        raise _crash(code, log)
    return Built.from_dict(result["built"])


def _crash(code: int, log: Path) -> GqaExportError:
    lines = last_lines(log.read_text(encoding="utf-8", errors="replace"))
    if sys.platform != "win32" and code == -signal.SIGKILL:
        return GqaExportError("the building process was killed, most likely because the machine ran out of memory",
                              "gqa-export trt", "use a machine with more memory: an engine's weights are held twice",
                              code="E-ENGINE-KILLED")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
    return GqaExportError(f"the building process ended with {how}; its last lines:\n{_indented(lines)}",
                          "gqa-export trt",
                          "run `gqa-export doctor`; if it finds nothing, report this with the lines above",
                          code="E-ENGINE-CRASH")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    (no messages)"
