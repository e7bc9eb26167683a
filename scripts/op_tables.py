"""Writes the tables of docs/op.md from the modules that define the ops.   python scripts/op_tables.py"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gqa_export import attention_op, long_attention_op, state_ops
from gqa_export.attention_op import Attribute, Port
from gqa_export.state_ops import StateAttribute, StateOp, StatePort

PAGE = Path(__file__).resolve().parent.parent / "docs" / "op.md"
END = "<!-- end -->"


def begin(source: str) -> str:
    """The mark before the tables from a module."""
    return f"<!-- tables from gqa_export/{source}: begin -->"


def tables(title: str, inputs: Iterable[Port | StatePort], outputs: Iterable[Port | StatePort],
           attributes: Iterable[Attribute | StateAttribute], first_input: int = 0, first_output: int = 0) -> str:
    """Inputs, outputs and attributes of an op as Markdown."""
    lines = [title, "", "| # | input | shape | type | |", "|---|---|---|---|---|"]
    for number, port in enumerate(inputs, first_input):
        name = f"`{port.name}`{' (optional)' if port.optional else ''}"
        lines.append(f"| {number} | {name} | [{', '.join(port.shape)}] | {port.type} | {port.meaning} |")
    lines += ["", "| # | output | shape | type | |", "|---|---|---|---|---|"]
    for number, port in enumerate(outputs, first_output):
        lines.append(f"| {number} | `{port.name}` | [{', '.join(port.shape)}] | {port.type} | {port.meaning} |")
    lines += ["", "| attribute | type | |", "|---|---|---|"]
    lines += [f"| `{attribute.name}` | {attribute.type} | {attribute.meaning} |" for attribute in attributes]
    return "\n".join(lines)


def attention() -> str:
    """The tables of the attention op, and what its later version has beyond them."""
    first = tables(f"`{attention_op.DOMAIN}::{attention_op.OP}`, version {attention_op.VERSION}.", attention_op.INPUTS,
                   attention_op.OUTPUTS, attention_op.ATTRIBUTES)
    lines = [f"Version {attention_op.CODES_VERSION}, where the cache holds [codes](#a-cache-of-codes), has after them:",
             "", "| attribute | type | |", "|---|---|---|",
             *(f"| `{attribute.name}` | {attribute.type} | {attribute.meaning} |"
               for attribute in attention_op.CODE_ATTRIBUTES)]
    return "\n".join([first, "", *lines])


def long_attention() -> str:
    """The tables of the op for long prompts: what it has beyond those of the attention op."""
    inputs = [port for port in long_attention_op.INPUTS if port not in attention_op.INPUTS]
    outputs = [port for port in long_attention_op.OUTPUTS if port not in attention_op.OUTPUTS]
    first = len(attention_op.ATTRIBUTES)
    return tables(f"`{long_attention_op.DOMAIN}::{long_attention_op.OP}`, version {long_attention_op.VERSION}: after "
                  f"those of `{attention_op.OP}`", inputs, outputs, long_attention_op.ATTRIBUTES[first:],
                  len(attention_op.INPUTS), len(attention_op.OUTPUTS))


def state(op: StateOp) -> str:
    """The tables of a state op."""
    return tables(f"`{state_ops.DOMAIN}::{op.name}`, version {state_ops.VERSION}.", op.inputs, op.outputs,
                  op.attributes)


def rewritten(page: str) -> str:
    """The page with fresh tables between its marks."""
    for source, text in (("attention_op.py", attention()), ("long_attention_op.py", long_attention()),
                         ("state_ops.py", "\n\n".join(map(state, state_ops.STATE_OPS)))):
        before, rest = page.split(begin(source))
        page = f"{before}{begin(source)}\n{text}\n{END}{rest.split(END, 1)[1]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
