"""The exceptions of the project: what went wrong, where, and what to do next.

Every refusal that a user can meet is a `GqaExportError`. The command line prints it and exits with its `exit_code`:
0 passed, 1 outputs differ, 2 bad input, 3 could not be checked here; 70 is a bug of gqa-export. Programs and tests
tell refusals apart by their kind (the class) and by `code`, which stays the same when a message is worded anew;
docs/errors.md lists every code.
"""

from __future__ import annotations

EXIT_PASSED = 0
EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_CHECKED = 3
EXIT_BUG = 70
"""an error of gqa-export itself (EX_SOFTWARE of sysexits.h), so that it is told from bad input"""


LONGEST_CAUSE = 500
"""characters of somebody else's message that are quoted"""


def cause_of(error: BaseException) -> str:
    """An exception in one line: its type and every line of its message, since the cause often stands on the second or
    last one. Of a message beyond LONGEST_CAUSE characters the beginning and the end."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST_CAUSE:
        text = f"{text[:LONGEST_CAUSE * 2 // 3]} ... {text[-(LONGEST_CAUSE // 3 - 5):]}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class GqaExportError(Exception):
    """A refusal with its cause, place and remedy; the base of all kinds, and the kind of a wrong option or setting.

    Attributes:
        code: stable name of the cause, such as "E-BUNDLE-HASH".
        what: one sentence, the cause: what was expected and what was found.
        where: file, layer, node or argument.
        fix: what the user does next.
        exit_code: of the command that ends with this.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, where: str = "", fix: str = "", *, code: str = "") -> None:
        self.what, self.where, self.fix, self.code = what, where, fix, code
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at:  {self.where}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _remade, (type(self), self.what, self.where, self.fix, self.code)


def _remade(kind: type[GqaExportError], what: str, where: str, fix: str, code: str) -> GqaExportError:
    return kind(what, where, fix, code=code)


class InvalidCheckpoint(GqaExportError):
    """A checkpoint that cannot be read as one: files missing, damaged, contradictory or in a refused format."""


class UnsupportedModel(GqaExportError):
    """A sound checkpoint whose model cannot be exported, or not as asked: a layer, a mask, an argument, a target."""


class InvalidBundle(GqaExportError):
    """A bundle that is damaged, is not what its manifest says, or does not belong to the checkpoint it is held to."""


class OutputDiffers(GqaExportError):
    """A comparison came to its end and the bundle's outputs are not PyTorch's. The bundle must not be used."""

    exit_code = EXIT_DIFFERENT


class NotCheckedHere(GqaExportError):
    """The request is sound, but this machine cannot run the check. Never to be read as a pass."""

    exit_code = EXIT_NOT_CHECKED
