"""The one exception of the project: what went wrong, where, and what to do next.

Every refusal that a user can meet is a `GqaExportError`; the command line prints it as three lines and exits
with its `exit_code`. Exit codes: 0 passed, 1 outputs differ, 2 bad input, 3 could not be checked here.
"""

from __future__ import annotations

EXIT_PASSED = 0
EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_CHECKED = 3


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message, at most 300 characters of it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


class GqaExportError(Exception):
    """A refusal with its cause, place and remedy.

    what: one sentence, the cause. where: file, layer, node or argument. fix: what the user does next.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at:  {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.where, self.fix)


class NotCheckedHere(GqaExportError):
    """The request is sound, but this machine cannot run the check. Never to be read as a pass."""

    exit_code = EXIT_NOT_CHECKED
