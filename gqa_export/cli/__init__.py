"""The command line: `gqa-export VERB ...`. This module imports the standard library and click, nothing else.

Every verb is a module `gqa_export.cli.<verb>` that defines a click command named `command`, imported when the verb
is used. Exit codes as in `gqa_export.errors`: 0 passed, 1 outputs differ, 2 bad input (or a bug of ours), 3 could not
be checked here; 130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import EXIT_BAD_INPUT, GqaExportError

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
DEBUG = "gqa_export.debug"

VERBS: dict[str, str] = {
    "onnx": "Export a checkpoint to an ONNX decoder with a KV cache.",
    "trt": "Build a TensorRT engine, with the attention plugin or without.",
    "validate": "Compare a bundle with PyTorch, step by step.",
    "bisect": "Name the first layer and op that differ from PyTorch.",
    "run": "Let a bundle answer a prompt.",
    "bench": "Measure load time, tokens per second and memory.",
    "convert": "Give a checkpoint fewer key/value heads: MHA to GQA to MQA.",
    "uptrain": "Continue pre-training after a conversion.",
    "inspect": "Show the attention layers and the KV-cache cost of a bundle or checkpoint.",
    "models": "List the architectures that were checked, and why others are refused.",
    "doctor": "Show what is installed, what can run here and what is missing.",
}

# Packages that an installation may lack, and the extra of gqa-export that brings each.
EXTRA_OF: dict[str, str] = {
    "onnxruntime": "ort",
    "datasets": "uptrain",
    "onnxruntime_genai": "test",
    "tensorrt": "trt",
    "tensorrt_rtx": "rtx",
    "triton": "plugins",
    "cuda": "plugins",
}


def set_debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Remember `--debug`, wherever on the line it stood."""
    if value:
        ctx.meta[DEBUG] = True


def debug_option() -> click.Option:
    """`--debug`, for the group and for every verb."""
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=set_debug, help="Show the traceback of an error."
    )


class LazyGroup(click.Group):
    """A group that imports a verb only when it is used and ends every failure with one cause and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order a user meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name}").command
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(debug_option())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; turn whatever it raises into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.UsageError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            fail(error, debug=bool(ctx.meta.get(DEBUG)))


def fail(error: BaseException, *, debug: bool) -> NoReturn:
    """Print what happened on standard error, and raise SystemExit with the exit code that belongs to it."""
    code, message = explain(error)
    if debug:
        traceback.print_exception(error)
    if message:
        click.echo(f"error: {message}", err=True)
    sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an exception."""
    if isinstance(error, GqaExportError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, click.ClickException):
        return EXIT_BAD_INPUT, error.format_message()  # click's own code 1 means "outputs differ" here
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return EXIT_BROKEN_PIPE, ""
    if is_out_of_memory(error):
        fix = "close other programs, use a machine with more memory, or export with --weights link"
        return EXIT_BAD_INPUT, str(GqaExportError("the machine has no memory left for this", fix=fix))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("gqa_"):
        package = error.name.split(".")[0]
        wanted = f"gqa-export[{EXTRA_OF[package]}]" if package in EXTRA_OF else package
        what = f"the Python package {package} is not installed"
        return EXIT_BAD_INPUT, str(GqaExportError(what, fix=f"pip install '{wanted}' (see `gqa-export doctor`)"))
    cause = (str(error).strip().splitlines() or ["no message"])[0]
    where = "this is a bug in gqa-export; rerun with --debug and report the traceback"
    return EXIT_BAD_INPUT, f"{type(error).__name__}: {cause}\n  {where}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or PyTorch (which raises a RuntimeError) could not allocate."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


main = LazyGroup(
    name="gqa-export",
    help="Grouped-query attention decoders from PyTorch to ONNX, proved right.",
    params=[debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
main = click.version_option(__version__, prog_name="gqa-export")(main)


def entry() -> NoReturn:
    """The `gqa-export` program: run, flush, and leave at once (tearing PyTorch down takes a second otherwise)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    code: Any = EXIT_BAD_INPUT
    try:
        main.main(prog_name="gqa-export")
    except SystemExit as ending:
        code = 0 if ending.code is None else ending.code
    if "gqa_export.files.staging" in sys.modules:
        sys.modules["gqa_export.files.staging"].tidy_up()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or EXIT_BAD_INPUT
    os._exit(code if isinstance(code, int) else EXIT_BAD_INPUT)
