"""The work folder of a run, `.NAME.uptrain` beside the output: whose it is, and what an unfinished run in it was.

Its lock `.NAME.uptrain.lock` is held by the run that fills it; the system unlocks it when that process ends, however it
ends. `settings.json` in it holds what decides the numbers of the run: options, and digests of the checkpoint, the
texts and the teacher, so that a folder that was moved is the same and a file that was edited is not.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.content import model_digest, tokenizer_digest
from ..errors import GqaExportError
from ..files.resume import LOCK, claim
from ..files.write_text import write_text
from .options import UptrainOptions
from .rows import content_of

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

SETTINGS = "settings.json"


def work_folder(output: Path) -> Path:
    """Where a run keeps its rows and checkpoints until it is done."""
    return output.resolve().parent / f".{output.name}.uptrain"


def settings_of(checkpoint: Checkpoint, options: UptrainOptions, processes: int) -> dict[str, Any]:
    """What must be equal for a run to be resumed. processes: that share a step."""
    from ..checkpoint.open import open_checkpoint

    chosen = json.loads(options.settings())
    for name in ("text", "eval_text"):
        chosen[name] = content_of(chosen[name]) if chosen[name] else ""
    if options.teacher:
        chosen["teacher"] = model_digest(open_checkpoint(options.teacher))
    return {"checkpoint": model_digest(checkpoint), "tokenizer": tokenizer_digest(checkpoint), "processes": processes,
            **chosen}


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Hold the lock of a work folder, so that two runs cannot mix; it is gone at the end.

    Raises:
        GqaExportError: another run holds it.
    """
    path = work.with_name(work.name + LOCK)
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = claim(path)
    while lock is not None and not path.exists():  # a run that ended removed it between opening and locking
        lock.release()
        lock = claim(path)
    if lock is None:
        raise GqaExportError("another run is filling the work folder of this output", str(work),
                             "wait until it ends, or choose another output with -o", code="E-UPTRAIN-RUNNING")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def open_work(work: Path, settings: dict[str, Any], restart: bool) -> None:
    """Make the work folder, or go on in that of the same run. restart: throw away what an unfinished run left.

    Raises:
        GqaExportError: an unfinished run had other settings.
    """
    if restart and work.exists():
        shutil.rmtree(work)
    if (work / SETTINGS).is_file():
        before = _settings_in(work / SETTINGS)
        other = sorted(name for name in settings.keys() | before.keys() if before.get(name) != settings.get(name))
        if other:
            raise GqaExportError(f"an unfinished run has other settings (different: {', '.join(other)})", str(work),
                                 "repeat its settings to go on, or pass --restart to throw it away",
                                 code="E-UPTRAIN-OTHER-SETTINGS")
        return
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / SETTINGS, json.dumps(settings, indent=1) + "\n")


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def on_first_rank(process: int, processes: int, action: Callable[[], None]) -> None:
    """Run `action` in process 0 while the others wait; what it raises is raised in all of them."""
    failure: list[Any] = [None]
    if process == 0:
        try:
            action()
        except Exception as error:
            failure = [error]
    if processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
