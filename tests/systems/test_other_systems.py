"""macOS and Windows, as far as Linux can show: `other_system.py` says what is simulated, and what is not."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from gqa_models import write_tiny

import gqa_export

from .other_system import HIDDEN, names_of

CHILD = Path(__file__).with_name("other_system.py")
ROOT = Path(gqa_export.__file__).parent
LOOKED_AT = ("os", "signal", "errno", "time", "socket", "select")


def run(system: str, program: str, drive: Path, *arguments: str | Path) -> str:
    """Standard output of a program in a process that resembles another system; it must end well.

    Its temporary files are in `drive`/temporary, its console knows the letters of Western Europe only.
    """
    for name in ("temporary", "cache"):
        (drive / name).mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(drive / "temporary"), "GQA_DRIVE": str(drive), "PYTHONUTF8": "0",
                   "PYTHONIOENCODING": "cp1252:strict", "PYTHONWARNDEFAULTENCODING": "1", "LC_ALL": "C",
                   "PYTHONCOERCECLOCALE": "0", "XDG_CACHE_HOME": str(drive / "cache")}
    done = subprocess.run([sys.executable, str(CHILD), system, program, *map(str, arguments)], capture_output=True,
                          timeout=300, env=environment)
    assert done.returncode == 0, done.stderr.decode("cp1252", errors="replace")[-6000:]
    return done.stdout.decode("cp1252")


FILES = """
import signal, sys
from pathlib import Path
from gqa_export.engine.run_child import _crash
from gqa_export.environment.machine import describe_machine, peak_bytes
from gqa_export.errors import GqaExportError
from gqa_export.files.atomic_replace import move_files, undisturbed
from gqa_export.files.scratch import scratch_folder
from gqa_export.files.staging import writing_folder
from gqa_export.files.write_text import write_text

place, windows = Path(sys.argv[1]), sys.argv[2] == "win32"
names = lambda folder: sorted(path.name for path in folder.iterdir())

def written(text):
    with writing_folder(place / "out", force=True, marker="file") as new:
        (new / "file").write_text(text, encoding="utf-8")

written("1")
written("2")
assert (place / "out" / "file").read_text(encoding="utf-8") == "2"
assert names(place) == ["cache", "out", "temporary"], names(place)

# A file of the old result is open: Windows lets nobody replace it. The error says so, and the old result is whole.
with (place / "out" / "file").open("rb"):
    try:
        written("3")
        assert not windows
    except GqaExportError as error:
        assert windows and error.code == "E-FILE-WRITE" and "open" in error.fix, error
assert (place / "out" / "file").read_text(encoding="utf-8") == ("2" if windows else "3")
assert names(place) == ["cache", "out", "temporary"], names(place)

for name, text in (("new/m", "new"), ("new/z", "z"), ("checkpoint/m", "old")):
    (place / name).parent.mkdir(exist_ok=True)
    write_text(place / name, text)
move_files(["m", "z"], place / "new", place / "checkpoint")
assert names(place / "checkpoint") == ["m", "z"]
assert (place / "checkpoint" / "m").read_text(encoding="utf-8") == "new"

# What is still open when a scratch folder ends goes with the next one of that purpose.
with scratch_folder("test") as left:
    (left / "x").write_text("x", encoding="utf-8")
    held = (left / "x").open("rb")
assert left.exists() == windows
held.close()
with scratch_folder("test"):
    pass
assert names(left.parent) == [], names(left.parent)

try:
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
        reached = True
    raise SystemExit("Ctrl-C was lost")
except KeyboardInterrupt:
    assert reached, "Ctrl-C struck inside"

log = place / "log"
write_text(log, "the last line")
error = _crash(3221225477, log)  # 0xC0000005, as Windows numbers an access violation
assert error.code == "E-ENGINE-CRASH" and "the last line" in error.what
assert describe_machine().cores > 0
assert peak_bytes() >= 0
"""


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_folders_and_files_are_written_replaced_and_tidied_up(system: str, tmp_path: Path) -> None:
    run(system, FILES, tmp_path, tmp_path, system)


WHOLE = """
import importlib, pkgutil, sys
from pathlib import Path
import gqa_export
from gqa_export import cli

place = Path(sys.argv[1])

def command(*arguments):
    try:
        cli.main.main(args=[str(one) for one in arguments], prog_name="gqa-export", standalone_mode=False)
    except SystemExit as ending:
        return ending.code or 0
    return 0

for found in pkgutil.walk_packages(gqa_export.__path__, "gqa_export."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)

export = "onnx", place / "checkpoint", "-o", place / "bundle", "--target", "ort", "--dtype", "fp32"
assert command(*export, "--no-validate") == 0
assert command(*export, "--no-validate", "--force", "--weights", "link") == 0
assert command("validate", place / "bundle", "--against", place / "checkpoint", "--level", "quick") == 0
assert command("run", place / "bundle", "--token-ids", "1,2,3", "--max-new-tokens", "4") == 0

session = gqa_export.open_bundle(place / "bundle").session(provider="cpu")
assert command(*export, "--no-validate", "--force") == 2, "the session has a file of the bundle open"
assert (place / "bundle" / "model.onnx").is_file()
del session
assert command(*export, "--no-validate", "--force") == 0

# A comparison lets the files of its folder, which may be a scratch folder, go although its runner is still there
from gqa_export.bundle.manifest import read_manifest
from gqa_export.validation.session_runner import onnxrt_infer
with onnxrt_infer(place / "bundle", read_manifest(place / "bundle"), "cpu") as infer:
    pass
(place / "bundle" / "model.onnx.data").rename(place / "bundle" / "moved")
left = [path.name for path in (place / "temporary").iterdir() if "gqa" in path.name]
assert not left, left
print(sorted(path.name for path in place.iterdir()))
"""


def test_windows_imports_every_module_and_exports_validates_and_runs(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path / "checkpoint", num_hidden_layers=2)
    out = run("win32", WHOLE, tmp_path, tmp_path)
    assert out.splitlines()[-1] == "['bundle', 'cache', 'checkpoint', 'temporary']"
    assert "PASSED" in out


@functools.cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


def reached(tree: ast.AST, system: str) -> list[ast.AST]:
    """The nodes that a system may reach: without what `if sys.platform ...` keeps from it, and without `try` blocks
    that fall back from a missing module."""
    found: list[ast.AST] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        found.append(node)
        if isinstance(node, ast.If | ast.IfExp) and ast.unparse(node.test).startswith("sys.platform "):
            platform = types.SimpleNamespace(platform=system)
            test = node.test.values[0] if isinstance(node.test, ast.BoolOp) else node.test
            taken = node.body if eval(ast.unparse(test), {"sys": platform}) else node.orelse
            pending += taken if isinstance(taken, list) else [taken]
        elif isinstance(node, ast.Try) and any("ImportError" in ast.unparse(one.type)
                                               for one in node.handlers if one.type):
            pending += [*node.handlers, *node.orelse, *node.finalbody]
        else:
            pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_nothing_is_used_without_a_fallback_that_a_system_lacks(system: str) -> None:
    """By typeshed's tables, over the whole package: the two tests above run a part of it."""
    names = {module: names_of(module, system) | {"path"} for module in LOOKED_AT}
    lacking = set(HIDDEN[system]) - {"triton", "cuda"}
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in reached(parsed(path), system):
            used = ""
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in LOOKED_AT:
                used = "" if node.attr in names[node.value.id] else ast.unparse(node)
            elif isinstance(node, ast.Import):
                used = next((alias.name for alias in node.names if alias.name in lacking), "")
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used = node.module if node.module in lacking else ""
            if used:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} uses {used}")
    assert not wrong, "\n".join(wrong)
