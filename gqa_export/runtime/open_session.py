"""Any bundle as a session: an engine in TensorRT, a graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from ..bundle.manifest import read_manifest
from ..errors import GqaExportError
from .session import Session


def open_bundle(folder: Path | str, provider: str = "auto", *, low_memory: bool = False, threads: int = 0,
                exact: bool = False) -> Session:
    """Open a bundle for running: a graph in ONNX Runtime, an engine in TensorRT.

    Args:
        folder: of the bundle.
        provider: "cpu", "cuda" or "auto": CUDA if it is there.
        low_memory: leave the weights in their files, mapped; about 12 % slower.
        threads: of ONNX Runtime; 0 lets it choose.
        exact: do not use the graph for long prompts, where the bundle has one. An engine takes none of the four.

    Raises:
        InvalidBundle: the bundle is damaged, or an engine is for another GPU or library.
        NotCheckedHere: this machine cannot run it.
        GqaExportError: an option that an engine does not take.
    """
    if read_manifest(folder).engine is None:
        from .ort.session import OrtSession

        return OrtSession.load(folder, provider, low_memory=low_memory, threads=threads, approximate=not exact)
    for option, given in (("--provider", provider != "auto"), ("--low-memory", low_memory), ("--threads", threads),
                          ("--exact", exact)):
        if given:
            raise GqaExportError("an engine runs as it was built, on the GPU", option, f"leave out {option}",
                                 code="E-OPTION-ENGINE")
    from .tensorrt.session import EngineSession

    return EngineSession.load(folder)
