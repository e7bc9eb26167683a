"""The house's own rules, read from the source: who may import whom, how long a module is, what must not be spelt."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gqa_export
from gqa_export.cli import VERBS

ROOT = Path(gqa_export.__file__).parent.parent
PACKAGE = ROOT / "gqa_export"
PLUGINS = ROOT / "plugins"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *PLUGINS.rglob("*.py"), *(ROOT / "models").rglob("*.py")])
STAGES = {"bisect", "checkpoint", "trace", "graph", "targets", "engine", "run", "compare", "report", "convert",
          "uptrain"}
# Stages may import the targets' table (facts, no code) and, below graph, nothing of another stage.
LENDS = {("graph", "targets.table"), ("run", "targets.table"), ("trace", "targets.table"), ("engine", "targets.table"),
         ("targets", "graph"), ("trace", "graph"),
         # a report tells of verdicts
         ("report", "compare.verdict"), ("report", "compare.trail"),
         # a conversion asks the model's own attention where its heads are
         ("convert", "checkpoint"), ("convert", "trace.attention"), ("convert", "trace.skeleton"),
         ("convert", "trace.probe"), ("uptrain", "checkpoint"),
         # a bisection is a comparison of its own: it opens both sides, and judges with the same tolerance
         ("bisect", "checkpoint"), ("bisect", "run"), ("bisect", "compare.tolerance")}
FOUNDATIONS = {"leftovers", "swap", "manifest_rules", "memory", "errors", "contract", "spec", "cache_io",
               "engine_facts", "bundle", "output_folder"}
NEVER = {
    "checkpoint": {"onnx", "onnxruntime", "tensorrt", "onnx_ir", "onnxscript"},
    "trace": {"onnxruntime", "tensorrt"},
    "graph": {"torch"},
    "targets": {"torch"},
    "engine": {"torch", "onnxruntime"},
    "compare": {"torch", "onnxruntime", "tensorrt"},
    "report": {"torch", "onnx", "onnxruntime", "tensorrt", "polygraphy"},
    "convert": {"onnx", "onnxruntime", "tensorrt", "onnx_ir", "onnxscript"},
    "uptrain": {"onnx", "onnxruntime", "tensorrt", "onnx_ir", "onnxscript"},
}
LONGEST_MODULE = 300


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports, the relative ones resolved; `a.b` for `from a import b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = [*path.relative_to(ROOT).parts[:-1]]
    found: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def stage_of(module: str) -> str:
    """`gqa_export.runtime.ort.session.OrtSession` -> `run`; "" for what is in no stage."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "gqa_export" and parts[1] in STAGES else ""


def stage_files() -> list[tuple[str, Path]]:
    return [(path.relative_to(PACKAGE).parts[0], path) for path in SOURCES
            if PACKAGE in path.parents and path.relative_to(PACKAGE).parts[0] in STAGES]


def test_no_stage_imports_another() -> None:
    wrong = []
    for stage, path in stage_files():
        for module in imports(path):
            other = stage_of(module)
            lent = any(stage == borrower and module.removeprefix("gqa_export.").startswith(what)
                       for borrower, what in LENDS)
            if other and other != stage and not lent:
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_stages_stay_away_from_the_packages_of_others() -> None:
    wrong = [f"{name_of(path)} imports {module}" for stage, path in stage_files() for module in imports(path)
             if module.split(".")[0] in NEVER.get(stage, set())]
    assert not wrong, "\n".join(wrong)


def test_foundations_import_the_standard_library_only() -> None:
    wrong = []
    for name in sorted(FOUNDATIONS):
        for module in imports(PACKAGE / f"{name}.py"):
            top = module.split(".")[0]
            if top != "gqa_export" and top not in sys.stdlib_module_names:
                wrong.append(f"{name}.py imports {module}")
            if top == "gqa_export" and module.split(".")[1] not in FOUNDATIONS:
                wrong.append(f"{name}.py imports {module}")
    assert not wrong, "\n".join(wrong)


def test_only_pipeline_validation_and_the_command_line_see_several_stages() -> None:
    allowed = {"asked.py", "crosscheck.py", "matrix.py", "proof.py", "pipeline.py", "validation.py"}
    wrong = []
    for path in PACKAGE.glob("*.py"):
        stages = {stage_of(module) for module in imports(path)} - {""}
        if len(stages) > 1 and path.name not in allowed:
            wrong.append(f"{name_of(path)} sees {sorted(stages)}")
    assert not wrong, "\n".join(wrong)


def test_kernels_never_import_tensorrt_and_primitives_never_torch() -> None:
    folder = PLUGINS / "grouped_attention"
    wrong = [f"{name_of(path)} imports {module}" for path in folder.glob("*.py") if path.name != "tensorrt.py"
             for module in imports(path) if module.split(".")[0] in {"tensorrt", "tensorrt_rtx"}]
    wrong += [f"primitives.py imports {module}" for module in imports(folder / "primitives.py")
              if module.split(".")[0] == "torch"]
    wrong += [f"{name}.py imports triton" for name in ("reference", "validate")
              for module in imports(folder / f"{name}.py") if module.split(".")[0] == "triton"]
    assert not wrong, "\n".join(wrong)


def comparisons(tree: ast.AST) -> list[tuple[ast.Compare, str]]:
    """(comparison, attribute's name) for every `x.attribute == "constant"` or `!=` or `in (...)` of strings."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        words = any(isinstance(item, ast.Constant) and isinstance(item.value, str)
                    for side in sides for item in ast.walk(side))
        names = [side.attr for side in sides if isinstance(side, ast.Attribute)]
        names += [side.id for side in sides if isinstance(side, ast.Name)]
        found += [(node, name) for name in names if words]
    return found


def test_nothing_asks_for_the_name_of_a_model_or_target() -> None:
    wrong = []
    target_names = {"ort", "onnx", "portable", "trt-plugin", "trt-native"}
    for path in SOURCES:
        for node, attribute in comparisons(ast.parse(path.read_text(encoding="utf-8"))):
            words = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant)}
            target = attribute in {"name", "target"} and words & target_names
            if target or attribute in {"model_type", "architecture"}:
                wrong.append(f"{name_of(path)}:{node.lineno} compares {attribute} with {sorted(map(str, words))}")
    assert not wrong, "ask for a fact instead:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_is_short_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE
    assert not text or ast.get_docstring(ast.parse(text)), "a module opens by saying what it is"


def public_definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Module-level functions and classes without an underscore, and the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found: list = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    for owner in [node for node in found if isinstance(node, ast.ClassDef)]:
        found += [node for node in owner.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if PACKAGE in p.parents], ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    missing = [node.name for node in public_definitions(ast.parse(path.read_text(encoding="utf-8")))
               if not ast.get_docstring(node)]
    assert not missing


def modules_loaded_by(arguments: list[str]) -> set[str]:
    """Top-level modules in memory after the command line ran with these arguments, in a fresh process."""
    code = ("import sys\nfrom gqa_export.cli import main\n"
            f"try:\n    main.main({arguments!r}, standalone_mode=True)\nexcept SystemExit as e:\n"
            "    assert not e.code, e.code\n"
            "print('LOADED', *{name.split('.')[0] for name in sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_the_standard_library_and_click_only(arguments: list[str]) -> None:
    before = {"gqa_export", "click", "colorama", "__main__"}
    startup = subprocess.run([sys.executable, "-c", "import sys; print(*{n.split('.')[0] for n in sys.modules})"],
                             capture_output=True, text=True, check=True).stdout.split()
    foreign = modules_loaded_by(arguments) - set(sys.stdlib_module_names) - before - set(startup)
    assert not foreign


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_option_of_a_verb_says_what_it_does(verb: str) -> None:
    import importlib

    import click

    command = importlib.import_module(f"gqa_export.cli.{verb}").command
    assert command.help.strip()
    assert not [option.opts for option in command.params if isinstance(option, click.Option) and not option.help]


def test_the_repository_names_no_machine_and_no_package_host() -> None:
    host = "pypi" + r"\.|files\.python" + "hosted|registry" + r"\.npm|proxy\.golang"
    machine = "/wor" + r"k/|/op" + "t/|/ro" + "ot/|/ho" + "me/[a-z]"
    command = ["git", "-C", str(ROOT), "grep", "-nIE", f"({host}|{machine})"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    hits = [line for line in done.stdout.splitlines() if not line.startswith("LICENSE")]
    assert not hits, "\n".join(hits)
