"""Writes docs/errors.md: every refusal in the source by its code, grouped by what failed.

    python scripts/error_tables.py

Exit code 1, with a list, for a raise without a literal `code=`, a code of no known area and one that two kinds share.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from gqa_export import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"
FOLDERS = ("gqa_export", "plugins", "models")
KINDS = {name: kind for name, kind in vars(errors).items()
         if isinstance(kind, type) and issubclass(kind, errors.GqaExportError)}
PARAMETERS = ("what", "where", "fix")
CODE = re.compile(r"E-([A-Z]+)-[A-Z0-9]+(?:-[A-Z0-9]+)*")

AREAS: dict[str, tuple[str, str]] = {
    "CKPT": (
        "The checkpoint cannot be read",
        "`onnx`, `trt`, `inspect`, `convert`, `uptrain`; `validate` and `bisect` for the checkpoint of `--against`. "
        "Files are missing, damaged, contradict one another or have a format that is refused."),
    "MODEL": (
        "The model cannot be exported",
        "`onnx`, `trt`, `inspect`, `convert`. The checkpoint is sound. Its architecture, a layer, a mask or an "
        "argument of attention cannot be represented, or the model cannot be traced."),
    "TARGET": (
        "The target cannot hold the model",
        "`onnx`, `trt`. Another target, cache or number format can; the fix names it."),
    "GRAPH": (
        "The graph is not as expected",
        "`onnx` and `trt` while they rewrite a graph; `validate`, `run` and `bench` while they read one. A pass that "
        "rewrites another number of places than expected stops the export."),
    "WEIGHTS": (
        "The weights cannot be placed or converted",
        "`onnx`, `trt`, `validate --as`. A value overflows its new type, a file lies on another file system, a tensor "
        "is missing."),
    "BUNDLE": (
        "The bundle is damaged or does not match",
        "Every command that reads a bundle: `validate`, `run`, `bench`, `inspect`, `bisect`, `trt`. Files are missing, "
        "cut short or altered, or contradict the manifest."),
    "ENGINE": (
        "The engine cannot be built or opened",
        "`trt` while TensorRT builds; `run`, `bench` and `validate` while they open an engine."),
    "RUN": (
        "A session cannot run a step",
        "`run`, `bench`, `validate`, and sessions in your own program. Refused before anything runs: too many tokens, "
        "ids outside the vocabulary, padding on the left, a provider that cannot run the number format."),
    "VALIDATE": (
        "The comparison cannot be made",
        "`validate`, `bisect`, the pytest plugin. The bundle, the reference or the options do not allow a comparison "
        "with PyTorch."),
    "CONVERT": (
        "The key/value heads cannot be changed",
        "`convert`. The number of heads, the method or the architecture does not allow the conversion."),
    "UPTRAIN": (
        "The training cannot start or go on",
        "`uptrain`. Options contradict one another, the text is too short, or a result is not finite."),
    "FILE": (
        "A file or folder cannot be written",
        "Every command that writes. The output exists, the place is not writable, or the disk is full."),
    "ENV": (
        "A package or device is missing",
        "Every command. `gqa-export doctor` lists what this machine can run and how to install what is missing."),
    "OPTION": (
        "An option has an invalid value",
        "Every command, the Python API, and the kernels' functions."),
    "REPORT": (
        "A report or baseline cannot be read or written",
        "`validate` with `--json`, `--junit`, `--html`, `--github-summary`, `--baseline` or `--polygraphy`."),
}
HEAD = """# Every error, by its code

Made from the source by `scripts/error_tables.py`. An error is printed as four lines: the cause, the place (file,
layer, node or argument), the fix and the code. In Python it is a `GqaExportError` with `.what`, `.where`, `.fix` and
`.code`; the column *kind* names its class. Codes stay the same when messages are reworded: test and branch on codes.
`...` stands for what differs from case to case. The column *exit* is the exit code of the command: 2 is bad input, 3 is
"could not be checked here".

An error without a code that ends with exit code 70 is a bug of gqa-export. The message names a file with the traceback:
please report it.
"""


@dataclass(frozen=True)
class Refusal:
    """One place in the source that refuses.

    Attributes:
        module, line: where it is.
        kind: name of the error's class.
        code: its stable code; "" where the source gives none, or none that can be read without running it.
        what, where, fix: the texts, with `...` for what is computed.
    """

    module: str
    line: int
    kind: str
    code: str
    what: str
    where: str
    fix: str

    @property
    def area(self) -> str:
        """"CKPT" of "E-CKPT-HEADER"; "" for a code that is malformed."""
        found = CODE.fullmatch(self.code)
        return found[1] if found else ""


@dataclass(frozen=True)
class Maker:
    """A function that makes errors for its callers: it has a parameter `code` and hands it on."""

    kind: str
    parameters: tuple[str, ...]
    given: Mapping[str, ast.expr]


def words(node: ast.expr | None, names: Mapping[str, ast.expr]) -> str:
    """The text of an expression as far as it is fixed; `...` for the rest."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part.value if isinstance(part, ast.FormattedValue) else part, names)
                       for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left, names) + words(node.right, names)
    if isinstance(node, ast.IfExp):
        first, second = words(node.body, names), words(node.orelse, names)
        return first if first == second else f"{first} (or: {second or 'nothing'})"
    if isinstance(node, ast.Name) and node.id in names:
        return words(names[node.id], {})
    return "..."


def texts(nodes: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    """Names that these statements give a text: `FIX = "..."`."""
    return {target.id: node.value for node in nodes if isinstance(node, ast.Assign)
            for target in node.targets if isinstance(target, ast.Name)
            if isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp | ast.IfExp)}


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def sources() -> list[Path]:
    """Every file that may refuse."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def called(node: ast.AST) -> str:
    """The name of the function or class that an expression calls: `f` of `f(...)` and of `module.f(...)`."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def given_to(call: ast.Call, parameters: Sequence[str]) -> dict[str, ast.expr]:
    """The arguments of a call by the names of its parameters."""
    given = dict(zip(parameters, call.args, strict=False))
    return {**given, **{keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}}


def makers(tree: ast.Module) -> dict[str, Maker]:
    """The functions of a file that make errors with a code that their caller gives, by name."""
    found = {}
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        parameters = tuple(a.arg for a in (*function.args.args, *function.args.kwonlyargs) if a.arg != "self")
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and called(call) in KINDS:
                given = given_to(call, PARAMETERS)
                code = given.get("code")
                if isinstance(code, ast.Name) and code.id == "code" and "code" in parameters:
                    found[function.name] = Maker(called(call), parameters, given)
    return found


def imported_names(tree: ast.Module) -> set[str]:
    """What a file takes from other modules by name."""
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}


def refusals_in(path: Path, tree: ast.Module, shared: Mapping[str, ast.expr],
                known: Mapping[str, Maker]) -> Iterator[Refusal]:
    """All errors that a file makes. shared: the texts that any module offers to others; known: see `makers`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        name = called(node)
        if not isinstance(node, ast.Call) or name not in {*KINDS, *known}:
            continue
        around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
        maker = known.get(name)
        given = given_to(node, maker.parameters if maker else PARAMETERS)
        code = given.get("code")
        if isinstance(code, ast.Name) and any(f.name in known for f in around):
            continue  # inside of a maker: its callers are listed instead
        if isinstance(code, ast.Attribute) and code.attr == "code":
            continue  # an error that is raised again with its own code
        inside = [statement for f in around for statement in ast.walk(f) if isinstance(statement, ast.stmt)]
        names = {**shared, **texts(tree.body), **texts(inside)}
        if maker:
            names.update({parameter: ast.Constant(words(value, names)) for parameter, value in given.items()})
            given = dict(maker.given)
        literal = code.value if isinstance(code, ast.Constant) and isinstance(code.value, str) else ""
        yield Refusal(str(path.relative_to(ROOT)), node.lineno, maker.kind if maker else name, literal,
                      *(words(given[part], names) if part in given else "" for part in PARAMETERS))


def all_refusals() -> list[Refusal]:
    """Every refusal of the project, by module, in the order of the source."""
    trees = {path: parse(path) for path in sources()}
    shared = {name: node for tree in trees.values() for name, node in texts(tree.body).items() if name.isupper()}
    offered = {name: maker for tree in trees.values() for name, maker in makers(tree).items()}
    found = (refusal for path, tree in trees.items() for refusal in refusals_in(path, tree, shared, {
        **{name: maker for name, maker in offered.items() if name in imported_names(tree)}, **makers(tree)}))
    return sorted(found, key=lambda refusal: (refusal.module, refusal.line))


def without_code(refusals: Sequence[Refusal]) -> list[str]:
    """Refusals whose source gives no literal code."""
    return [f"{r.module}:{r.line}: {r.kind} without a literal code: {' '.join(r.what.split())}"
            for r in refusals if not r.code]


def malformed(refusals: Sequence[Refusal]) -> list[str]:
    """Codes that are not E-AREA-NAME with an area of `AREAS`."""
    return [f"{r.module}:{r.line}: {r.code} is not E-AREA-NAME with one of the areas {', '.join(AREAS)}"
            for r in refusals if r.code and r.area not in AREAS]


def of_two_kinds(refusals: Sequence[Refusal]) -> list[str]:
    """Codes that are given by errors of more than one class."""
    kinds: dict[str, set[str]] = {}
    for refusal in refusals:
        kinds.setdefault(refusal.code, set()).add(refusal.kind)
    return [f"{code} is used by {' and '.join(sorted(found))}" for code, found in sorted(kinds.items())
            if code and len(found) > 1]


def cell(parts: Sequence[str]) -> str:
    """Texts for one cell of a Markdown table, each once."""
    shown = dict.fromkeys(part.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip() for part in parts)
    return " <br> ".join(part for part in shown if part)


def page(refusals: Sequence[Refusal]) -> str:
    """The whole page: a section for each area, a row for each code."""
    by_code = sorted((r for r in refusals if r.area in AREAS), key=lambda r: (list(AREAS).index(r.area), r.code))
    lines = [HEAD]
    for area, of_area in groupby(by_code, key=lambda r: r.area):
        title, sentence = AREAS[area]
        lines += [f"## {title}", "", sentence, "", "| code | message | fix | kind | exit |", "|---|---|---|---|---|"]
        for code, same in groupby(of_area, key=lambda r: r.code):
            rows = list(same)
            lines.append(f"| `{code}` | {cell([r.what for r in rows])} | {cell([r.fix for r in rows])} | "
                         f"{rows[0].kind} | {KINDS[rows[0].kind].exit_code} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    found = all_refusals()
    PAGE.write_text(page(found), encoding="utf-8")
    wrong = [*without_code(found), *malformed(found), *of_two_kinds(found)]
    print(*wrong, sep="\n", file=sys.stderr)
    sys.exit(1 if wrong else 0)
