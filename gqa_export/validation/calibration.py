"""Whether a bundle's calibration is that of a text: the text is the one that the manifest names, and the scales of a
quantized cache are those that the checkpoint's keys and values have for it.

Weights that were quantized with a text are in `quantized_reference`, scales of inputs in `input_codes`.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.tokenized_text import read_text
from ..errors import GqaExportError, InvalidBundle
from ..exporting.kv_calibration import digest_of, keys_and_values, tokens_of
from ..progress import Progress
from ..quantized.kv_codes import as_good, clipped

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..checkpoint.checkpoint import Checkpoint

NEAR = 2.0**-10
"""how far a scale may be from one measured by other threads, and the share of clipped numbers from the manifest's"""


def takes_text(manifest: Manifest) -> bool:
    """Whether anything in a bundle was chosen with a calibration text."""
    return manifest.kv_cache is not None or bool(manifest.quantization and manifest.quantization.calibration)


def check_text(manifest: Manifest, text: Path | None) -> None:
    """Refuse a calibration text that has nothing to do, and another one than a bundle's weights were quantized with.

    Raises:
        GqaExportError: it is, or cannot be read.
    """
    if text is None:
        return
    wanted = "" if manifest.quantization is None else manifest.quantization.calibration
    content = read_text(text)
    if not takes_text(manifest):
        raise GqaExportError("a calibration text is given, and nothing in this bundle was chosen with one",
                             f"--calibrate {text}", "leave out --calibrate", code="E-OPTION-CALIBRATE-UNUSED")
    if wanted and hashlib.sha256(content.encode()).hexdigest() != wanted:
        raise _another_text("weights", text, wanted)


def _another_text(chosen: str, text: Path, wanted: str) -> GqaExportError:
    """The refusal of a text whose digest is not the one that a manifest names."""
    return GqaExportError(f"the scales of this bundle's {chosen} were chosen with a calibration text, and this is "
                          "another one", str(text), f"give the text that the export had (digest {wanted[:16]}...), or "
                          "leave out --calibrate", code="E-VALIDATE-CALIBRATION")


def check_scales(checkpoint: Checkpoint, manifest: Manifest, text: Path | None, notes: list[str],
                 say: Progress) -> None:
    """Measure the scales of a quantized cache again, and what they clip.

    Args:
        checkpoint: that was exported.
        manifest: of the bundle; its layers are the checkpoint's.
        text: the calibration text; None: a note says that the scales were held against nothing.
        notes: takes that line. say: called with what is done.

    Raises:
        GqaExportError: this is another text than the scales were chosen from.
        InvalidBundle: the manifest has another scale than the text gives, or clips another share of the numbers.
    """
    kv = manifest.kv_cache
    if kv is None:
        return
    if text is None:
        notes.append("the scales of the cache are the manifest's: they were held against no text (--calibrate TEXT "
                     "measures them again)")
        return
    ids = tokens_of(checkpoint, text)
    if digest_of(ids) != kv.calibration:
        raise _another_text("cache", text, kv.calibration)
    fp8, fix = kv.codes == "fp8", "validate against the checkpoint that was exported, or export it again"
    for scales, pair in zip(kv.scales, keys_and_values(checkpoint, ids, manifest.capacity, say), strict=True):
        for kind, numbers in zip(("key", "value"), pair):
            stated, share = getattr(scales, kind), getattr(scales, f"{kind}_clip")
            wanted, cut = as_good(numbers, kv.bits, fp8), clipped(numbers, stated, kv.bits, fp8)
            if not any(math.isclose(stated, scale, rel_tol=NEAR) for scale in wanted):
                raise InvalidBundle(f"the scale of the {kind}s of layer {scales.layer} is {stated:.6g} in the "
                                    f"manifest, and the calibration text gives {wanted[0]:.6g}", checkpoint.source, fix,
                                    code="E-BUNDLE-QUANTIZATION")
            if abs(share - cut) > NEAR:
                raise InvalidBundle(f"the manifest says that its scale clips {share:.3%} of the {kind}s of layer "
                                    f"{scales.layer}, and of the calibration text it clips {cut:.3%}",
                                    checkpoint.source, fix, code="E-BUNDLE-QUANTIZATION")
