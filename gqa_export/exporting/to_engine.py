"""From a checkpoint or a bundle to an engine bundle: the export, where one is needed, then the build."""

from __future__ import annotations

from pathlib import Path

from ..bundle.manifest import MANIFEST
from ..engine.build import EngineBuild, EngineOptions, build_engine, check_request, is_named
from ..engine.code_types import code_types_of_kinds, for_code_types
from ..errors import GqaExportError
from ..files.resume import remove
from ..files.staging import staging_folder
from ..progress import Progress

__all__ = ["EngineBuild", "EngineOptions", "build_engine", "make_engine"]

DEFAULT_ATTENTION = "plugin"


def make_engine(source: str, output: Path, options: EngineOptions, report: Progress,
                revision: str | None = None) -> EngineBuild:
    """source: a bundle folder of a TensorRT target, else a checkpoint, which is exported into a temporary bundle
    beside the output first. revision: of a hub id. Raises GqaExportError; then nothing is left behind."""
    if (Path(source) / MANIFEST).is_file():
        return build_engine(Path(source), output, options, report)
    from ..checkpoint.open import HUB_ID, open_checkpoint
    from .options import ExportOptions
    from .to_onnx import export_onnx

    kind = options.attention or DEFAULT_ATTENTION
    kinds: set[str] = set()
    if Path(source).exists() or HUB_ID.fullmatch(source) is None:
        # what is wrong with it is told before what this machine lacks
        kinds = {matrix.kind for matrix in open_checkpoint(source).quantized.values()}
    try:
        choice = check_request(output, options, kind)
    except GqaExportError as error:
        if error.code != "E-ENV-TENSORRT":
            raise
        raise GqaExportError(f"{source} is a checkpoint, not a bundle; it would be exported first, and to build its "
                             f"engine {error.what}", error.where, f"{error.fix}; the export alone does not need it: "
                             f"gqa-export onnx {source} -o DIR --target trt-{kind}", code="E-ENV-TENSORRT") from error
    for_code_types(choice, code_types_of_kinds(kinds), source, kept=True, named=is_named(options, choice))
    with staging_folder(output, output.absolute().parent) as (folder, left):
        remove(left)  # at once: a whole bundle that a killed run left
        bundle = folder / "bundle"
        export_onnx(source, bundle, ExportOptions(target=f"trt-{kind}", dtype=options.dtype,
                                                  capacity=options.capacity, revision=revision), report)
        return build_engine(bundle, output, options, report)
