"""`validate --polygraphy DIR`: PyTorch's answers for Polygraphy, and the command that compares with them."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.load_model import load_model


def write_golden(bundle: Path, against: str, folder: Path) -> str:
    """Write `inputs.json` and `outputs.json`; return the command. Its tolerance is the one that `compare.tolerance`
    assumes where nothing was measured.

    Raises GqaExportError for a bundle whose graph Polygraphy cannot run this way.
    """
    from ..bundle.manifest import MODEL, read_manifest
    from ..bundle.source_checkpoint import open_for
    from ..compare.tolerance import tolerance
    from ..runtime.torch_session import TorchSession
    from ..targets import get_target
    from ..validation.golden_files import INPUTS, OUTPUTS, check_target, write_files

    manifest = read_manifest(bundle)
    target = get_target(manifest.target)
    check_target(manifest, target)
    truth = TorchSession(load_model(open_for(manifest, against), manifest.dtype), manifest.capacity, "float64",
                         spec=manifest.spec)
    bound = tolerance(None, write_files(folder, truth, manifest), manifest.dtype).bound
    return (f"polygraphy run {bundle / MODEL} --onnxrt --load-inputs {folder / INPUTS} --load-outputs "
            f"{folder / OUTPUTS} --atol {bound:.3g}")
