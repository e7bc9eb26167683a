"""The wheel: made by `python -m build` from a clean copy, installed where the checkout is out of reach, and used.

The fresh environment has the third-party packages of the one that runs the tests: a .pth file adds their folder to its
path, and Python reads no .pth file of a folder that was added so. What makes the checkout importable (the finder of an
editable installation, PYTHONPATH) is therefore not active; a test says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_text import byte_tokenizer

import gqa_export
from gqa_export.cli import VERBS

pytestmark = pytest.mark.slow

ROOT = Path(gqa_export.__file__).parent.parent
API = ROOT / "docs" / "api.md"
FOLDERS = {"gqa_export": "gqa_export", "gqa_models": "models", "gqa_plugins": "plugins"}
"""the packages of the wheel, and the folders that they are in the checkout"""
IN_THE_CHECKOUT = (*FOLDERS.values(), "scripts", "tests", "docs", "pyproject.toml", "setup.py", "README.md", "LICENSE",
                   "constraints.txt")
DATA = (".typed", ".j2", ".json", ".toml", ".txt")

IMPORT_ALL = """
import importlib, json, sys
wrong = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.startswith("gqa_"):
            wrong[name] = str(error)
print(json.dumps(wrong))
"""


@dataclass(frozen=True)
class Installed:
    """The fresh environment, and a folder outside the checkout that holds the checkpoint `tiny-llama`."""

    environment: Path
    folder: Path

    def run(self, *command: str, program: str = "python", fails: bool = False) -> str:
        """What a program of the environment prints, run in `folder`; its exit code is 0 unless it `fails`."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run([str(self.environment / "bin" / program), *command], cwd=self.folder, env=clean,
                              capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL)
        assert (done.returncode != 0) is fails, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Made without the network: setuptools is taken from this environment."""
    copy = tmp_path_factory.mktemp("copy")
    unclean = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for name in IN_THE_CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=unclean)
        else:
            shutil.copy(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist")], cwd=copy,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [made] = (copy / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    environment = tmp_path_factory.mktemp("fresh") / "env"
    here = [sys.executable, "-m"]
    subprocess.run([*here, "venv", "--without-pip", str(environment)], check=True)
    fresh = environment / "bin" / "python"
    subprocess.run([*here, "pip", "--python", str(fresh), "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
                   check=True, timeout=200)
    [packages] = (environment / "lib").glob("python3*/site-packages")
    (packages / "third_party.pth").write_text("\n".join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))))
    ready = Installed(environment, tmp_path_factory.mktemp("elsewhere"))
    ready.run("-c", "import gqa_models; gqa_models.write_tiny('llama', 'tiny-llama', max_position_embeddings=128, "
                    "num_hidden_layers=2)")
    byte_tokenizer(ready.folder / "tiny-llama")
    return ready


def sources() -> set[str]:
    """What the wheel has to hold, by the names that it has there."""
    found = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", *DATA) and (path.parent / "__init__.py").is_file():
                found.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    return found


def test_the_wheel_holds_every_module_and_table_and_nothing_else(wheel) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == sources()
    assert {"gqa_export/py.typed", "gqa_export/bisect/bisection.py", "gqa_export/report/report.html.j2",
            "gqa_models/tiny.toml", "gqa_plugins/grouped_attention/decode.py"} <= held


def test_every_folder_with_modules_is_a_package() -> None:
    """A folder without `__init__.py` is importable from the checkout, and missing in the wheel."""
    folders = {path.parent for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_checkout_is_out_of_reach(installed) -> None:
    names = ", ".join((*FOLDERS, "torch"))
    script = f"import json, {names}; print(json.dumps([module.__file__ for module in ({names})]))"
    *ours, torch = map(Path, json.loads(installed.run("-c", script)))
    assert all(path.is_relative_to(installed.environment) for path in ours), ours
    assert torch.is_relative_to(sysconfig.get_paths()["purelib"])
    installed.run("-c", "import small_text", fails=True)
    installed.run("-c", "import evidence", fails=True)


def test_version_in_the_metadata_is_the_package_s(installed) -> None:
    said = installed.run("-c", "from importlib.metadata import version; print(version('gqa-export'))")
    assert said.strip() == gqa_export.__version__


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(installed, verb: str) -> None:
    assert f"gqa-export {verb}" in installed.run(verb, "--help", program="gqa-export")


def test_every_module_imports(installed) -> None:
    """But for those that need a package which this machine lacks."""
    modules = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                     for name in sources() if name.endswith(".py") and not name.endswith("__main__.py"))
    (installed.folder / "import_all.py").write_text(IMPORT_ALL)
    assert json.loads(installed.run("import_all.py", *modules).splitlines()[-1]) == {}


def test_doctor(installed) -> None:
    found = json.loads(installed.run("doctor", "--json", program="gqa-export"))
    assert found["ready"]
    assert found["machine"]["executable"] == str(installed.environment / "bin" / "python")


def test_export_and_bisect(installed) -> None:
    installed.run("onnx", "tiny-llama", "-o", "tiny-bundle", "--no-validate", program="gqa-export")
    said = installed.run("bisect", "tiny-bundle", "--against", "tiny-llama", program="gqa-export")
    assert "probes: prompt" in said


def test_python_of_the_api_page(installed, tmp_path: Path) -> None:
    """Its blocks, in order, in one process; `tiny-llama` is the checkpoint that they read."""
    blocks = re.findall(r"^```python\n(.*?)^```", API.read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    script = tmp_path / "page.py"
    script.write_text("".join(blocks))
    installed.run(str(script))
