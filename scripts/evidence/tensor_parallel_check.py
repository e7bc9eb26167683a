"""Checks a model cut over ranks: exported, opened as one merged graph, compared with PyTorch by the whole suite.

A row's verdict is `sharded`, `refused` (with the code and reason), `wrong` (outputs differ) or `failed` (an exception
that is not a refusal). The last two are bugs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gqa_export.errors import GqaExportError, cause_of

CAPACITY = 96
STEPS = 8
RANKS = (2, 3, 4, 8)
WIDE = {"num_attention_heads": 24, "num_key_value_heads": 4, "hidden_size": 96, "head_dim": 8}
"""heads that 2, 3, 4 and 8 divide; over 3 a rank's queries begin inside a group, over 8 a head is held twice"""
SIZES = {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 320, "max_position_embeddings": 256}
BOTH, PLUGIN = ("trt-native", "trt-plugin"), ("trt-plugin",)
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "llama": (BOTH, WIDE), "qwen2": (PLUGIN, WIDE), "qwen3": (("trt-native",), WIDE), "gemma2": (PLUGIN, WIDE),
    "mixtral": (BOTH, {**WIDE, "num_local_experts": 8}),
    "qwen3_moe": (PLUGIN, {**WIDE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
                           "norm_topk_prob": True}),
    "phi3": (PLUGIN, {**WIDE, "hidden_size": 192}), "olmo2": (("trt-native",), {**WIDE, "hidden_size": 192}),
}
"""family -> targets that hold it, and what its tiny configuration has otherwise"""


def check_family(name: str, ranks: int, target: str, work: Path) -> dict[str, Any]:
    """A row of a family's tiny model."""
    return check(write_family(name, work / "checkpoint"), ranks, target, work)


def write_family(name: str, folder: Path) -> Path:
    """The tiny checkpoint of a family."""
    import transformers
    from gqa_models import save_random, tiny_names, write_tiny

    values = FAMILIES[name][1]
    if name in tiny_names():
        return write_tiny(name, folder, **values)
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **values})
    return save_random(config, folder)


def check(checkpoint: Path, ranks: int, target: str, work: Path) -> dict[str, Any]:
    """Export a checkpoint over ranks and compare it. Never raises."""
    from evidence.architecture_check import multimodal
    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx
    from gqa_export.validation.validate import validate

    try:
        options = ExportOptions(target=target, capacity=CAPACITY, provider="cpu", text_only=multimodal(checkpoint),
                                tensor_parallel=ranks, dtype="fp32", weights="link")
        manifest = export_onnx(checkpoint, work / "bundle", options).manifest
        parallel = manifest.parallel
        assert parallel is not None
        verdict = validate(work / "bundle", checkpoint, steps=STEPS, provider="cpu", check_hashes=False)
        logits = [kind for case in verdict.cases for kind in case.kinds if kind.kind == "logits"]
        worst = max(logits, key=lambda kind: kind.max_abs / kind.bound if kind.bound else kind.max_abs)
        return {
            "verdict": "sharded" if verdict.passed else "wrong",
            **({} if verdict.passed else {"reason": str(verdict.first)[:300]}),
            "collectives": len(parallel.collectives), "vocabulary": parallel.vocabulary,
            "kv_heads": [list(rank.heads[0].kv) for rank in parallel.ranks],
            "worst": [float(f"{worst.max_abs:.2g}"), float(f"{worst.bound:.2g}")],
        }
    except GqaExportError as refusal:
        return {"verdict": "refused", "code": refusal.code,
                "reason": f"{refusal.what} [{str(refusal.where).replace(str(checkpoint), 'the checkpoint')}]"}
    except Exception as error:
        return {"verdict": "failed", "reason": cause_of(error)}
