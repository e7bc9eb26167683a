"""The configuration in a GGUF file, as transformers reads it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GqaExportError, first_line
from .gguf_header import GgufHeader, read_gguf_header
from .gguf_reader_patch import quick_gguf
from .quiet import quiet

if TYPE_CHECKING:
    import transformers


def identity(path: Path) -> tuple[str, int]:
    """What tells one file from another, or from an older one: its path and when it was changed."""
    return str(path.resolve()), path.stat().st_mtime_ns


@lru_cache(maxsize=1)
def gguf_facts(path: str, mtime_ns: int) -> tuple[transformers.PretrainedConfig, GgufHeader]:
    """Configuration and header of a GGUF file, read once per process."""
    from transformers import AutoConfig

    header = read_gguf_header(Path(path))
    try:
        # a file that does not say its vocabulary size has it in the list of tokens alone
        with quiet(), quick_gguf(vocabulary=header.about_model("vocab_size") is None):
            config = AutoConfig.from_pretrained(Path(path).parent, gguf_file=Path(path).name, local_files_only=True)
    except Exception as error:
        raise GqaExportError(f"transformers cannot read this GGUF architecture ({header.architecture}): "
                             f"{first_line(error)}", path, "give the original Hugging Face checkpoint") from error
    return config, header


def gguf_config(path: Path) -> dict[str, Any]:
    """The configuration in a GGUF file, refused where the file says more than transformers takes from it."""
    parsed, header = gguf_facts(*identity(path))
    config = parsed.to_dict()
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    said = header.about_model("rope.scaling.type")
    lost = []
    if ((said not in (None, "none")) or "rope_freqs.weight" in header.tensors) and rope == "default":
        lost.append("its rotary scaling")
    if header.about_model("attention.sliding_window") and not config.get("sliding_window"):
        lost.append("its attention window")
    if header.about_model("attn_logit_softcapping") and not config.get("attn_logit_softcapping"):
        lost.append("its attention softcap")
    if lost:
        raise GqaExportError(f"transformers drops {' and '.join(lost)} when it reads this GGUF file", str(path),
                             "give the original Hugging Face checkpoint: the exported model would be wrong")
    return config
