"""PTX text as a list of instructions. Only what Triton writes: one kernel, no calls, no local memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+")
INSTRUCTION = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%p\d+)\s+)?(?P<opcode>\S+)\s*(?P<operands>.*)")
LOCAL = re.compile(r"\.reg\s+\.\w+\s+([A-Za-z_]+)(?=[<;\s])")
LABEL = re.compile(r"(\$\w+):")


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: the predicate register it runs under, "" for none; negated: where that is false."""

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The opcode between its dots."""
        return tuple(self.opcode.split("."))

    @property
    def base(self) -> str:
        """What it does, without its modifiers."""
        return self.parts[0]

    @property
    def kind(self) -> str:
        """The type at its end."""
        return self.parts[-1]

    def __str__(self) -> str:
        under = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{under}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Program:
    """A kernel. parameters: the type of each, hidden ones included; labels: name -> index of an instruction."""

    name: str
    threads: int
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def registers(operand: str) -> list[str]:
    """The names inside braces, or the one name."""
    return [name for name in re.split(r"[\s,{}]+", operand) if name]


def number(text: str) -> int:
    """An integer as PTX writes it."""
    digits = text.rstrip("U")
    return int(digits, 16) if "0x" in digits.lower() else int(digits)


def parse(text: str) -> Program:
    """The kernel of a PTX file."""
    name = re.search(r"\.entry\s+(\w+)", text)
    threads = re.search(r"\.reqntid\s+(\d+)", text)
    assert name is not None
    assert threads is not None
    head, _, rest = text.partition(".reqntid")
    body = rest[rest.index("{") + 1:]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines = "\n".join(line.split("//")[0] for line in body.splitlines())
    for local in set(LOCAL.findall(lines)):  # of inline assembly, whose registers have names of their own
        lines = re.sub(rf"(?<![%\w.]){local}(\d*)\b(?!<)", rf"%{local}\1", lines)
    for raw in re.split(r"[;\n]", lines):
        line = raw.strip()
        if not line or line.startswith(".") or line in "{}":
            continue
        label = LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = INSTRUCTION.fullmatch(line)
        assert found is not None, line
        instructions.append(Instruction(found["opcode"], tuple(OPERAND.findall(found["operands"])),
                                        found["guard"] or "", found["negated"] == "!"))
    parameters = tuple(re.findall(r"\.param\s+\.(\w+)", head))
    return Program(name[1], int(threads[1]), parameters, tuple(instructions), labels)
