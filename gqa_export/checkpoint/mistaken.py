"""What a path that is not a checkpoint probably is, in words: the mistakes of a first try, each with its remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InvalidCheckpoint

LFS = b"version https://git-lfs"
MANIFEST = "gqa_export.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def refuse_file(path: Path, source: str) -> None:
    """Refuse a file that is known to be something else than a GGUF checkpoint, by what it is.

    Raises:
        InvalidCheckpoint: an ONNX graph or engine, a file of weights, a placeholder of Git LFS.
    """
    refuse_lfs(path)
    if path.suffix in (".onnx", ".engine") or path.name.endswith(".onnx.data"):
        raise InvalidCheckpoint("this is an exported model, not a checkpoint", source,
                                "give the checkpoint that it was exported from; to run it: gqa-export run FOLDER",
                                code="E-CKPT-EXPORTED")
    if path.suffix in PICKLES:
        raise InvalidCheckpoint("this is a file of weights, not the checkpoint", source,
                                f"give the folder that holds it: {path.parent}", code="E-CKPT-ONE-FILE")


def refuse_lfs(path: Path) -> None:
    """Refuse the placeholder that Git leaves where a large file was not downloaded.

    Raises:
        InvalidCheckpoint: the file is a pointer of Git LFS.
    """
    try:
        with path.open("rb") as file:
            pointer = file.read(len(LFS)) == LFS
    except OSError:
        return  # whoever reads the file says why it cannot be read
    if pointer:
        raise InvalidCheckpoint("the file is a placeholder of Git LFS, not the file itself", str(path),
                                "run `git lfs pull` in the folder of the clone", code="E-CKPT-GIT-LFS")


def refuse_folder(folder: Path, source: str, fix: str) -> NoReturn:
    """Refuse a folder without a config.json by what it is; `fix` is the remedy where nothing is known of it.

    Raises:
        InvalidCheckpoint: always.
    """
    refuse_bundle(folder, source)
    gguf = sorted(folder.glob("*.gguf"))
    inner = [place.parent for pattern in ("snapshots/*/config.json", "checkpoint-*/config.json", "*/config.json")
             for place in sorted(folder.glob(pattern))]
    if gguf:
        fix = f"give the GGUF file itself: {gguf[0]}"
    elif inner:
        fix = f"give the folder inside it that has one: {inner[-1]}"
    raise InvalidCheckpoint("the folder does not have a config.json", source, fix, code="E-CKPT-NO-CONFIG")


def refuse_bundle(folder: Path, source: str) -> None:
    """Refuse a folder that an export wrote; not a checkpoint's own, in which a bundle uses the weights where they are.

    Raises:
        InvalidCheckpoint: the folder has a manifest.
    """
    if (folder / MANIFEST).is_file() and not _is_own(folder):
        raise InvalidCheckpoint("this is a bundle, which was exported already, not a checkpoint", source,
                                f"give {exported_from(folder)}", code="E-CKPT-EXPORTED")


def exported_from(folder: Path) -> str:
    """The checkpoint that a bundle's manifest names, as words for a remedy."""
    named = _named(folder)
    return f"the checkpoint that it was exported from: {named[:200]}" if named else \
        "the checkpoint that it was exported from"


def _named(folder: Path) -> str:
    """What a bundle's manifest names as its checkpoint; "" where it cannot be read."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["source"]["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_own(folder: Path) -> bool:
    """Whether a bundle lies in the checkpoint that it was exported from: to name that would lead in a circle."""
    try:
        return bool(named := _named(folder)) and Path(named).resolve() == folder.resolve()
    except (OSError, ValueError):  # a name that no path can have
        return False


def refuse_weights(folder: Path, source: str, fix: str) -> NoReturn:
    """Refuse a folder whose weights have other names than transformers writes; the message lists those that are there.

    Raises:
        InvalidCheckpoint: always.
    """
    refuse_bundle(folder, source)
    there = sorted(path.name for path in folder.glob("*.safetensors"))
    if not there:
        raise InvalidCheckpoint("the folder has neither model.safetensors nor model.safetensors.index.json", source,
                                fix, code="E-CKPT-NO-WEIGHTS")
    listed = ", ".join(there[:3]) + (f" and {len(there) - 3} more" if len(there) > 3 else "")
    remedy = "download model.safetensors.index.json too" if len(there) > 1 else \
        "download the version of the model that transformers loads"
    raise InvalidCheckpoint("the folder has neither model.safetensors nor model.safetensors.index.json; it has "
                            f"{listed}", source, remedy, code="E-CKPT-NO-WEIGHTS")


def refuse_foreign(config: dict[str, Any], names: list[str], source: str) -> None:
    """Refuse tensors that another program wrote under the names of a transformers checkpoint.

    Raises:
        InvalidCheckpoint: MLX's quantization, or a PEFT adapter saved as a whole model.
    """
    if isinstance(config.get("quantization"), dict) and any(name.endswith(".scales") for name in names):
        bits = config["quantization"].get("bits", "few")
        raise InvalidCheckpoint(f"the checkpoint is quantized by MLX ({bits} bits), which is not read", source,
                                "export the original, unquantized checkpoint", code="E-CKPT-MLX")
    if any(name.startswith("base_model.model.") for name in names):
        raise InvalidCheckpoint("the tensors are those of a PEFT model (base_model.model. ...), not of its base model",
                                source, "merge the adapter first (peft: merge_and_unload, then save_pretrained)",
                                code="E-CKPT-ADAPTER")
