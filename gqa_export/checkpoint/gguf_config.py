"""The configuration in a GGUF file, as transformers reads it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModel, cause_of
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
        # a file without the size of its vocabulary has it in the list of tokens alone
        with quiet(), quick_gguf(vocabulary=header.about_model("vocab_size") is None):
            config = AutoConfig.from_pretrained(Path(path).parent, gguf_file=Path(path).name, local_files_only=True,
                                                trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModel(f"transformers cannot read the GGUF architecture {header.architecture!r}: "
                               f"{cause_of(error)}", path, "give the original Hugging Face checkpoint",
                               code="E-CKPT-GGUF-ARCHITECTURE") from error
    return config, header


def gguf_config(path: Path) -> dict[str, Any]:
    """The configuration in a GGUF file, as a dict like that of config.json.

    Args:
        path: the .gguf file.

    Raises:
        UnsupportedModel: transformers cannot read the file's architecture, or drops a fact that changes the result
            (rotary scaling, an attention window, a softcap).
    """
    parsed, header = gguf_facts(*identity(path))
    config = parsed.to_dict()
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    scaling = header.about_model("rope.scaling.type")
    lost = []
    if ((scaling not in (None, "none")) or "rope_freqs.weight" in header.tensors) and rope == "default":
        lost.append("its rotary scaling")
    if header.about_model("attention.sliding_window") and not config.get("sliding_window"):
        lost.append("its attention window")
    if header.about_model("attn_logit_softcapping") and not config.get("attn_logit_softcapping"):
        lost.append("its attention softcap")
    if lost:
        raise UnsupportedModel(f"transformers drops {' and '.join(lost)} when it reads this GGUF file, and the "
                               "exported model would be wrong", str(path), "give the original Hugging Face checkpoint",
                               code="E-CKPT-GGUF-DROPPED")
    return config
