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
SCRIPTS = ROOT / "scripts"
ORDER = (
    ("errors", "spec", "attention_op", "long_attention_op", "state_ops", "progress"),
    ("graph_io", "targets", "target_refusals", "files", "environment", "compare", "quantized"),
    ("graph", "checkpoint", "report"),
    ("trace", "lowering", "bundle", "uptraining"),
    ("weights", "quantizing", "engine", "runtime", "describe", "sharding", "long_context"),
    ("exporting", "conversion", "validation"),
    ("bisect", "integrations", "objects", "api"),
    ("cli", "__main__"),
)
"""the rooms of gqa_export: each imports rooms of its own line and of the lines above, and no two import one another"""
FOUNDATIONS = ("errors", "progress", "spec", "attention_op", "long_attention_op", "state_ops", "graph_io",
               "targets", "target_refusals")
"""modules at the root; with `api` and what Python itself asks for there is nothing else"""
NEVER = {
    "bundle": {"torch", "onnxruntime", "tensorrt"},
    "checkpoint": {"onnx", "onnxruntime", "tensorrt", "onnx_ir", "onnxscript"},
    "trace": {"onnxruntime", "tensorrt"},
    "graph": {"torch"},
    "lowering": {"torch"},
    "sharding": {"torch", "onnxruntime", "tensorrt"},
    "engine": {"torch", "onnxruntime"},
    "compare": {"torch", "onnxruntime", "tensorrt"},
    "quantized": {"torch", "transformers", "onnx", "onnxruntime", "tensorrt"},
    "report": {"torch", "onnx", "onnxruntime", "tensorrt", "polygraphy"},
    "conversion": {"onnx", "onnxruntime", "tensorrt", "onnx_ir", "onnxscript"},
    "uptraining": {"onnx", "onnxruntime", "tensorrt", "onnx_ir", "onnxscript"},
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


def modules() -> dict[str, Path]:
    """Every module of gqa_export by its dotted name; a package is its `__init__`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules() -> dict[str, set[str]]:
    """For every module of gqa_export the modules of gqa_export that it imports, wherever in the file it does."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        names = {target for target in imports(path) if target.split(".")[0] == "gqa_export"}
        found[name] = {target if target in known else target.rpartition(".")[0] for target in names}
    return found


def room_of(module: str) -> str:
    """`gqa_export.runtime.ort.session` -> `runtime`; "" for gqa_export itself."""
    return (module.split(".")[1:2] or [""])[0]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The circles of a graph (its strongly connected parts of two or more), each sorted."""
    import networkx

    graph = networkx.DiGraph([(start, end) for start, ends in arrows.items() for end in ends if start != end])
    return [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1]


def room_arrows() -> dict[str, set[str]]:
    """For every room the other rooms that it imports."""
    found: dict[str, set[str]] = {}
    for module, targets in imported_modules().items():
        found.setdefault(room_of(module), set()).update({room_of(target) for target in targets} - {""})
    found.pop("", None)
    return {room: others - {room} for room, others in found.items()}


def test_the_root_holds_the_foundations_the_api_and_packages() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "__main__", "api", *FOUNDATIONS}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders | loose - {"__init__"} == {room for line in ORDER for room in line}


def test_rooms_import_rooms_of_their_own_line_or_above() -> None:
    rank = {room: place for place, line in enumerate(ORDER) for room in line}
    wrong = [f"{room} imports {other}" for room, others in room_arrows().items() for other in others
             if rank[other] > rank[room]]
    assert not wrong, "\n".join(sorted(wrong))


def test_imports_form_no_circle_of_rooms_and_none_of_files() -> None:
    assert not circles(room_arrows())
    assert not circles(imported_modules())


def test_a_circle_is_found_and_a_chain_is_not_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": {"c"}}) == []


def test_nothing_that_users_install_imports_the_evidence() -> None:
    wrong = [f"{name_of(path)} imports {module}" for path in SOURCES for module in imports(path)
             if module.split(".")[0] in {"evidence", "scripts", "tests"}]
    assert not wrong, "\n".join(wrong)


def test_rooms_stay_away_from_the_packages_of_others() -> None:
    wrong = [f"{module} imports {other}" for module, path in modules().items() for other in imports(path)
             if other.split(".")[0] in NEVER.get(room_of(module), set())]
    assert not wrong, "\n".join(wrong)


def test_foundations_import_the_standard_library_only() -> None:
    wrong = [f"{name}.py imports {module}" for name in FOUNDATIONS for module in imports(PACKAGE / f"{name}.py")
             if module.split(".")[0] not in {"gqa_export", *sys.stdlib_module_names}]
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


def test_modules_are_short_and_say_what_they_are() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in [*SOURCES, *(SCRIPTS / "evidence").rglob("*.py")]}
    long = [f"{name_of(path)} has {lines} lines" for path, text in texts.items()
            if (lines := len(text.splitlines())) > LONGEST_MODULE]
    silent = [f"{name_of(path)} has no docstring" for path, text in texts.items()
              if not ast.get_docstring(ast.parse(text))]
    assert not long + silent, "\n".join(long + silent)


def public_definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Module-level functions and classes without an underscore, and the public methods of those classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found: list = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    for owner in [node for node in found if isinstance(node, ast.ClassDef)]:
        found += [node for node in owner.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return found


def test_everything_public_has_a_docstring() -> None:
    missing = [f"{name_of(path)}: {node.name}" for path in modules().values()
               for node in public_definitions(ast.parse(path.read_text(encoding="utf-8")))
               if not ast.get_docstring(node)]
    assert not missing, "\n".join(missing)


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
