"""Writes the tables of docs/op.md from gqa_export/attention_op.py.   python scripts/op_tables.py"""

from __future__ import annotations

from pathlib import Path

from gqa_export import attention_op

PAGE = Path(__file__).resolve().parent.parent / "docs" / "op.md"
BEGIN, END = "<!-- tables from gqa_export/attention_op.py: begin -->", "<!-- end -->"


def tables() -> str:
    """Inputs, outputs and attributes as Markdown."""
    lines = [f"`{attention_op.DOMAIN}::{attention_op.OP}`, version {attention_op.VERSION}.", "",
             "| # | input | shape | type | |",
             "|---|---|---|---|---|"]
    for number, port in enumerate(attention_op.INPUTS):
        name = f"`{port.name}`{' (optional)' if port.optional else ''}"
        lines.append(f"| {number} | {name} | [{', '.join(port.shape)}] | {port.type} | {port.meaning} |")
    lines += ["", "| # | output | shape | type | |", "|---|---|---|---|---|"]
    for number, port in enumerate(attention_op.OUTPUTS):
        lines.append(f"| {number} | `{port.name}` | [{', '.join(port.shape)}] | {port.type} | {port.meaning} |")
    lines += ["", "| attribute | type | |", "|---|---|---|"]
    lines += [f"| `{attribute.name}` | {attribute.type} | {attribute.meaning} |"
              for attribute in attention_op.ATTRIBUTES]
    return "\n".join(lines)


def rewritten(page: str) -> str:
    """The page with fresh tables between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
