"""Writes docs/errors.md: every refusal in the source, with its fix.   python scripts/error_tables.py"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
ERRORS = {"GqaExportError": 2, "NotCheckedHere": 3}
HEAD = """# Every error message

Made from the source by `scripts/error_tables.py`. A message is printed as three lines: the cause, the place (file,
layer, node or argument) and the fix; `...` stands for what differs from case to case. Exit code 2 is bad input, 3 is
"could not be checked here".
"""


@dataclass(frozen=True)
class Refusal:
    """One place in the source that refuses: cause and fix with `...` for what is computed."""

    module: str
    line: int
    code: int
    what: str
    fix: str


def words(node: ast.expr | None, names: dict[str, ast.expr]) -> str:
    """The text of an expression as far as it is fixed; `...` for the rest."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part, names) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left, names) + words(node.right, names)
    if isinstance(node, ast.IfExp):
        return f"{words(node.body, names)} (or: {words(node.orelse, names)})"
    if isinstance(node, ast.Name) and node.id in names:
        return words(names[node.id], {})
    return "..."


def texts(nodes: list[ast.stmt]) -> dict[str, ast.expr]:
    """Names that these statements give a text: `FIX = "..."`."""
    return {target.id: node.value for node in nodes if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)
            if isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp)}


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def refusals_in(path: Path, shared: dict[str, ast.expr]) -> Iterator[Refusal]:
    """All calls of the error classes in a file; `shared`: the texts that any module offers to others."""
    tree = parse(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in ERRORS:
            continue
        around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
        inside = [statement for f in around for statement in ast.walk(f) if isinstance(statement, ast.stmt)]
        names = {**shared, **texts(tree.body), **texts(inside)}
        given = dict(zip(("what", "where", "fix"), node.args, strict=False))
        given.update({keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
        what = words(given.get("what"), names)
        if what.strip(". :"):
            yield Refusal(str(path.relative_to(ROOT)), node.lineno, ERRORS[node.func.id], what,
                          words(given["fix"], names) if "fix" in given else "")


def all_refusals() -> list[Refusal]:
    """Every refusal of the project, by module, in the order of the source."""
    paths = sorted([*(ROOT / "gqa_export").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
    shared = {name: node for path in paths for name, node in texts(parse(path).body).items() if name.isupper()}
    return sorted((found for path in paths for found in refusals_in(path, shared)), key=lambda r: (r.module, r.line))


def cell(text: str) -> str:
    """Text for a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip()


def page() -> str:
    """The whole page."""
    lines, module, seen = [HEAD], "", set()
    for refusal in all_refusals():
        if refusal.module != module:
            module = refusal.module
            lines += [f"\n## {module}\n", "| message | fix | code |", "|---|---|---|"]
        row = f"| {cell(refusal.what)} | {cell(refusal.fix)} | {refusal.code} |"
        if (module, row) not in seen:
            seen.add((module, row))
            lines.append(row)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
