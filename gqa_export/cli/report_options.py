"""The options of `validate` that write reports. Imports the standard library and click only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from ..errors import GqaExportError, cause_of

FILE = click.Path(path_type=Path, dir_okay=False)
OPTIONS = {
    "json": click.option("--json", "json", type=FILE, help="Write the verdict as JSON."),
    "junit": click.option("--junit", "junit", type=FILE, help="Write the verdict as JUnit XML."),
    "html": click.option("--html", "html", type=FILE, help="Write the verdict as one HTML page without scripts."),
    "github": click.option("--github-summary", "github", is_flag=True,
                           help="Append the verdict to the summary of this GitHub Actions step."),
    "baseline": click.option("--baseline", "baseline", type=FILE,
                             help="Also fail if the errors are clearly larger than those in this file."),
    "update_baseline": click.option("--update-baseline", "update_baseline", is_flag=True,
                                    help="Write the errors of this run into --baseline FILE."),
}
POLYGRAPHY = click.option("--polygraphy", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
                          help="First write PyTorch's outputs there, for `polygraphy run`.")


def report_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options; it takes them as one argument `reports`, a `report.Reports`. They are checked
    before the command begins. Reports are written whatever it ends in, a bug and an interruption included: a CI system
    must not read those of the run before."""

    @wraps(command)
    def wrapped(*args: Any, **given: Any) -> Any:
        from ..report.reports import Reports

        reports = Reports(**{name: given.pop(name) for name in OPTIONS})
        reports.check()
        bundles, against = given.get("bundles") or (given["bundle"],), given.get("against")
        folder = given.pop("polygraphy")
        try:
            for bundle in bundles if folder is not None else ():
                write_golden(bundle, against, folder if len(bundles) == 1 else folder / bundle.name)
            return command(*args, reports=reports, **given)
        except (SystemExit, click.exceptions.Exit):
            raise
        except BaseException as error:
            reports.failed([str(bundle) for bundle in bundles], str(against), problem_of(error))
            raise

    for option in (POLYGRAPHY, *reversed(OPTIONS.values())):
        option(wrapped)
    return wrapped


def problem_of(error: BaseException) -> GqaExportError:
    """What an exception is in a report: the refusal itself, or a problem whose exit code is that of the command."""
    from ..report.outcome import Crash
    from . import as_refusal

    refusal = as_refusal(error)
    if refusal is not None:
        return refusal
    if isinstance(error, click.ClickException):
        return GqaExportError(error.format_message(), "the command line", "see `gqa-export validate --help`",
                              code="E-OPTION-USAGE")
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Crash("the run was interrupted", "", "run it again", code="E-REPORT-INTERRUPTED")
    return Crash(cause_of(error), "", "this is a bug in gqa-export: report it", code="E-REPORT-BUG")


def write_golden(bundle: Path, against: str | None, folder: Path) -> None:
    """Write the files for Polygraphy and say how to use them. Raises GqaExportError."""
    if against is None:
        raise click.UsageError("--polygraphy writes PyTorch's answers: pass --against CHECKPOINT")
    from .golden import write_golden as write

    click.echo(write(bundle, against, folder))
