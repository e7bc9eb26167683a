"""The command line: `gqa-export VERB ...`. This module imports the standard library and click, nothing else.

Every verb is a module `gqa_export.cli.<verb>` that defines a click command named `command`, imported when the verb
is used. Exit codes as in `gqa_export.errors`: 0 passed, 1 outputs differ, 2 bad input, 3 could not be checked here, 70
a bug of gqa-export; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import EXIT_BAD_INPUT, EXIT_BUG, GqaExportError, cause_of

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
DEBUG = "gqa_export.debug"

VERBS: dict[str, str] = {
    "onnx": "Export a checkpoint to an ONNX decoder with a KV cache.",
    "trt": "Build a TensorRT engine, with the attention plugin or without.",
    "validate": "Compare a bundle with PyTorch, step by step.",
    "bisect": "Find the first layer and operator whose output is out of tolerance.",
    "run": "Generate text from a prompt.",
    "bench": "Measure load time, tokens per second and memory.",
    "long": "Measure what approximate attention costs on long prompts.",
    "convert": "Reduce the key/value heads of a checkpoint: MHA to GQA to MQA.",
    "uptrain": "Continue pre-training after a conversion.",
    "inspect": "Show the attention layers and the KV-cache cost of a bundle or checkpoint.",
    "models": "List the architectures that were checked, and why others are refused.",
    "demo": "Fetch a small real model, export it, compare it with PyTorch, generate an answer.",
    "doctor": "List what this machine can run and how to install what is missing.",
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
    """Record `--debug`, wherever it is on the line."""
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

    def resolve_command(self, ctx: click.Context,
                        args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb of a command line; a word that is none ends with the nearest verb."""
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            from difflib import get_close_matches

            from .words import VERB_OF

            near = [VERB_OF[name]] if name in VERB_OF else get_close_matches(name, VERBS, 1)
            ctx.fail(f"unknown command {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; turn an exception into a message and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.UsageError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            fail(error, debug=bool(ctx.meta.get(DEBUG)))


def fail(error: BaseException, *, debug: bool) -> NoReturn:
    """Print the error on standard error, and raise SystemExit with its exit code."""
    code, message = explain(error)
    if debug:
        traceback.print_exception(error)
    if message:
        from .progress import tell

        tell(f"error: {message}\n")  # the exit code tells it too, and must be this one
    sys.exit(code)


def explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an exception."""
    refusal = as_refusal(error)
    if refusal is not None:
        return refusal.exit_code, str(refusal) + (f"\n  code: {refusal.code}" if refusal.code else "")
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return EXIT_INTERRUPTED, "interrupted"
    if isinstance(error, click.ClickException):
        return EXIT_BAD_INPUT, error.format_message()  # click's own code 1 means "outputs differ" here
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return EXIT_BROKEN_PIPE, ""
    kept = keep_traceback(error)
    report = f"report it with the traceback in {kept}" if kept else "rerun with --debug and report the traceback"
    return EXIT_BUG, f"{cause_of(error)}\n  this is a bug in gqa-export; {report}"


def as_refusal(error: BaseException) -> GqaExportError | None:
    """The refusal that an exception is or stands for: no memory, a package that is not installed. Else None."""
    if isinstance(error, GqaExportError):
        return error
    if is_out_of_memory(error):
        return GqaExportError("the machine has no memory left for this", code="E-ENV-MEMORY",
                              fix="close other programs, use a machine with more memory, or export with --weights link")
    if isinstance(error, OSError) and error.errno and error.errno != errno.EPIPE:
        return GqaExportError(f"the system refused: {error.strerror or os.strerror(error.errno)}", place_of(error),
                              "check that the path exists, may be read or written, and that its disk has room",
                              code="E-FILE-SYSTEM")
    if isinstance(error, UnicodeEncodeError) and "\ud800" <= error.object[error.start] <= "\udfff":
        return GqaExportError("a text or file name is not valid Unicode", ascii(error.object[:200]),
                              "give text in UTF-8, and rename files whose names are not UTF-8", code="E-OPTION-UNICODE")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("gqa_"):
        package = error.name.split(".")[0]
        wanted = f"gqa-export[{EXTRA_OF[package]}]" if package in EXTRA_OF else package
        return GqaExportError(f"the Python package {package} is not installed", code="E-ENV-PACKAGE",
                              fix=f"pip install '{wanted}' (see `gqa-export doctor`)")
    return None


def place_of(error: OSError) -> str:
    """What the system refused to open, or that the working directory is gone."""
    try:
        os.getcwd()
    except OSError:
        return "the working directory does not exist any more"
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""


def keep_traceback(error: BaseException) -> str:
    """Write the traceback of a bug into a new file and return its path; "" where no file can be written."""
    try:
        handle, name = tempfile.mkstemp(prefix="gqa-export-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"gqa-export {__version__}, Python {sys.version.split()[0]}: {' '.join(sys.argv)}\n\n")
            traceback.print_exception(error, file=file)
    except OSError:
        return ""
    return name


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or PyTorch (which raises a RuntimeError) could not allocate."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


main = LazyGroup(
    name="gqa-export",
    help="Export decoders with grouped-query attention to ONNX and TensorRT, and check them against PyTorch.",
    params=[debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
main = click.version_option(__version__, prog_name="gqa-export")(main)


def in_one_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """This function, called from a frame that asks for a large evaluation stack and does not use it.

    CPython keeps the frames of Python functions in blocks of 16 KiB, and gives a block back to the system as soon as
    the last frame leaves it: where calls go to and fro across the end of one (thousands of times while a model is
    traced), each costs two system calls and a page of zeros. The block of such a frame has half a megabyte to spare.

    Source: CPython, Python/pystate.c, `push_chunk` and `_PyThreadState_PopFrame`.
    """
    def call(*given: Any, **named: Any) -> Any:
        return function(*given, **named)

    with contextlib.suppress(ValueError):  # another Python may refuse
        call.__code__ = call.__code__.replace(co_stacksize=1 << 16)
    return call


def entry() -> NoReturn:
    """The `gqa-export` program: run, flush, and leave at once (tearing PyTorch down takes a second otherwise)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1:2] in (["onnx"], ["validate"]):  # the other verbs train, compile or load whole models
        from ..environment.stand_ins import stand_in

        stand_in()
    code: Any = EXIT_BUG
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None or closed
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console that is not UTF-8
    try:
        in_one_block(main.main)(prog_name="gqa-export")
    except SystemExit as ending:
        code = 0 if ending.code is None else ending.code
    if "gqa_export.files.staging" in sys.modules:
        sys.modules["gqa_export.files.staging"].tidy_up()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:  # a pipe that was closed, a full disk
            if stream is sys.stdout:  # a result that did not arrive; what is told beside it may get lost
                code = code or (EXIT_BROKEN_PIPE if getattr(error, "errno", 0) == errno.EPIPE else EXIT_BAD_INPUT)
    os._exit(code if isinstance(code, int) else EXIT_BUG)
