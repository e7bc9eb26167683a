"""`gqa-export doctor`: what is installed, what can run here, and how to install what is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from ..errors import EXIT_NOT_CHECKED, EXIT_PASSED
from .tables import aligned, readable_bytes

if TYPE_CHECKING:
    from ..environment.doctor import Diagnosis


@click.command(short_help="List what this machine can run and how to install what is missing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(as_json: bool) -> None:
    """List what is installed, what this machine can run, and the command that installs what is missing.

    Exit codes: 0 exporting and validating on the CPU can run here, 3 they cannot.
    """
    from .. import api
    from .progress import progress

    with progress("checking this machine"):
        found = api.doctor()
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else "\n".join(describe(found)))
    raise SystemExit(EXIT_PASSED if found.ready else EXIT_NOT_CHECKED)


def describe(found: Diagnosis) -> list[str]:
    """The whole answer as lines of text."""
    here = found.machine
    free = f"{readable_bytes(here.memory_bytes)} of memory, {readable_bytes(here.free_memory_bytes)} free"
    gpus = [f"{gpu.name}, compute capability {gpu.compute_capability}, {readable_bytes(gpu.memory_bytes)}"
            for gpu in here.gpus]
    driver = f"driver for CUDA {here.driver}" if here.driver else "no NVIDIA driver"
    lines = [
        f"gqa-export {found.version}",
        f"  Python {here.python} ({here.executable}), {here.system}",
        f"  {here.processor}, {here.cores} core{'s' if here.cores != 1 else ''}, "
        f"{free if here.memory_bytes else 'memory unknown'}",
        f"  GPU: {'; '.join(gpus) or 'none'}, {driver}",
        f"  ONNX Runtime providers: {', '.join(found.providers) or 'none'}",
        "",
        "packages",
        *aligned(("name", "version", "state"),
                 [(state.name, state.version or "-", state.error or "ok") for state in found.packages], left=3),
        "",
        "what can run here",
    ]
    for answer in found.abilities:
        why = f": {answer.reason}" if answer.reason else ""
        lines.append(f"  {'yes' if answer.ready else 'no':3}  {answer.what}{why}")
        if answer.fix:
            lines.append(f"         fix: {answer.fix}")
    lines += ["", "problems" if found.problems else "no problems found"]
    for problem in found.problems:
        lines += [f"  {problem.what}: {problem.reason}", f"         fix: {problem.fix}"]
    return lines
