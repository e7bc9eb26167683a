"""Compare the readers of quantized checkpoints with the libraries that write the formats.

    python scripts/quantized_oracles.py

Each library quantizes a random matrix and stores it in its own layout; the reader's values are held against the
library's own dequantization. Run it in an environment of its own, with this repository on PYTHONPATH and torch, numpy,
safetensors, transformers, gguf and compressed-tensors, bitsandbytes, torchao and nvidia-modelopt: their pins clash with
the project's. The result is docs/benchmarks/quantized_oracles.json; a test holds it against the readers' source.
"""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
READERS = ROOT / "gqa_export" / "checkpoint" / "quantized"
OUTPUT = ROOT / "docs" / "benchmarks" / "quantized_oracles.json"
LIBRARIES = {"compressed-tensors": "compressed_tensors.py", "bitsandbytes": "bitsandbytes.py", "torchao": "torchao.py",
             "nvidia-modelopt": "modelopt.py"}
"""library -> the module of its reader"""
ROWS, COLUMNS = 96, 256
Case = tuple[str, dict[str, Any], dict[str, Any], Any]
"""what it is, the entry of config.json, stored tensors of a module, the library's values"""


def digest(module: str) -> str:
    """sha256 of a reader's code, comments and docstrings aside."""
    tree = ast.parse((READERS / module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not (  # type: ignore[attr-defined]
                isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def compressed_tensors() -> Iterator[Case]:
    """Packed and plain integers, float8 and four-bit floats."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * .05
    for form, arguments in (
            ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
            ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32}),
            ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
            ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
            ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
            ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]}),
            ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16})):
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        state = {"weight": weight.clone(), **_scales(weight, form, arguments)}
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = dict(compressor.compress(dict(state), scheme))
        values = compressor.decompress(dict(stored), scheme)["weight"]
        entry = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": arguments}}}
        name = f"{form}, {', '.join(f'{key} {value}' for key, value in arguments.items())}"
        yield name, entry, {f".{key}": value for key, value in stored.items()}, values


def _scales(weight: Any, form: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Scales of a weight, for the largest magnitude of each part."""
    import torch

    strategy, group = arguments["strategy"], arguments.get("group_size", COLUMNS)
    parts = weight.reshape(ROWS, -1, group)
    if strategy == "block":
        high, wide = arguments["block_structure"]
        parts = weight.reshape(ROWS // high, high, COLUMNS // wide, wide).swapaxes(1, 2).reshape(
            ROWS // high, COLUMNS // wide, -1)
    peak = parts.abs().amax(-1) if strategy != "tensor" else weight.abs().amax().reshape(1)
    if form.startswith("nvfp4"):
        whole = 448 * 6 / weight.abs().amax().reshape(1)
        return {"weight_scale": (whole * peak / 6).to(torch.float8_e4m3fn).float(), "weight_global_scale": whole}
    if arguments.get("symmetric") is False:
        low, high = parts.amin(-1), parts.amax(-1)
        scale = (high - low) / 15
        return {"weight_scale": scale, "weight_zero_point": (torch.round(-low / scale) - 8).clamp(-8, 7).to(torch.int8)}
    top = 448.0 if arguments.get("type") == "float" else 2 ** (arguments["num_bits"] - 1) - 0.5
    return {"weight_scale": peak / top}


def bitsandbytes() -> Iterator[Case]:
    """nf4 and fp4, with plain and with quantized scales, and int8."""
    import torch
    from bitsandbytes import functional

    torch.manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS) * .05
    for kind in ("nf4", "fp4"):
        for block in (64, 128):
            for nested in (False, True):
                packed, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind,
                                                         compress_statistics=nested)
                stored = {".weight": packed, **{f".weight.{key}": value for key, value in
                                                state.as_dict(packed=True).items()}}
                yield f"{kind}, block {block}{', nested' if nested else ''}", {"quant_method": "bitsandbytes"}, \
                    stored, functional.dequantize_4bit(packed, state)
    codes, peaks, _ = functional.int8_vectorwise_quant(weight.half())
    yield "int8", {"quant_method": "bitsandbytes"}, {".weight": codes, ".SCB": peaks.float()}, \
        functional.int8_vectorwise_dequant(codes, peaks.float())


def torchao() -> Iterator[Case]:
    """int8 weights."""
    import torch
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS, bias=False))
    quantize_(model, Int8WeightOnlyConfig(version=2))
    tensors, _ = flatten_tensor_state_dict(dict(model.state_dict()))
    yield "int8 weight only", {"quant_method": "torchao"}, {
        name.removeprefix("0"): tensor for name, tensor in tensors.items()}, model[0].weight.dequantize()


def modelopt() -> Iterator[Case]:
    """One layer of models that ModelOpt quantized and exported; its output projection, whose scales it does not unify
    with those of other layers."""
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in ("NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG"):
        torch.manual_seed(3)
        config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                             num_key_value_heads=2, vocab_size=128, architectures=["LlamaForCausalLM"])
        config.dtype = torch.float32
        model = mtq.quantize(LlamaForCausalLM(config).eval(), copy.deepcopy(getattr(mtq, name)),
                             lambda model: [model(torch.randint(0, 128, (2, 32))) for _ in range(4)])
        layer = model.model.layers[0].self_attn.o_proj
        values = None if "NVFP4" in name else layer.weight_quantizer(layer.weight.detach()).detach().clone()
        with tempfile.TemporaryDirectory() as folder:
            export_hf_checkpoint(model, export_dir=folder)
            entry = json.loads((Path(folder) / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
            tensors = load_file(Path(folder) / "model.safetensors")
        prefix = "model.layers.0.self_attn.o_proj"
        stored = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if values is None:
            packed = stored[".weight"]
            values = NVFP4QTensor(torch.Size((packed.shape[0], packed.shape[1] * 2)), torch.float32, packed).dequantize(
                torch.float32, scale=stored[".weight_scale"], double_scale=stored[".weight_scale_2"],
                block_sizes={-1: 16})
        if ".pre_quant_scale" in stored:
            values = values * stored[".pre_quant_scale"].float()
        yield name, {"quant_method": "modelopt", **entry}, stored, values


def compare(case: Case) -> dict[str, Any]:
    """What the reader makes of one case, beside the library's values."""
    from safetensors.torch import save_file

    from gqa_export.checkpoint.quantized.description import Description
    from gqa_export.checkpoint.quantized.read import read_quantized
    from gqa_export.checkpoint.safetensors_header import read_header

    name, entry, stored, values = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({f"layer{suffix}": tensor.detach().clone().contiguous() for suffix, tensor in stored.items()}, path)
        found = read_quantized(Description(entry["quant_method"], entry), read_header(path), folder)
        (matrix,) = found.matrices.values()
        ours, theirs = matrix.dequantize(), values.detach().double().numpy()
    assert not found.plain, sorted(found.plain)
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return {"case": name, "label": matrix.label, "stored": sorted(stored), "library computes in": str(values.dtype),
            "largest difference": worst}


def main() -> None:
    """Compare all, print a line each, write the result."""
    cases: dict[str, Callable[[], Iterator[Case]]] = {
        "compressed-tensors": compressed_tensors, "bitsandbytes": bitsandbytes, "torchao": torchao,
        "nvidia-modelopt": modelopt}
    result: dict[str, Any] = {"libraries": {}}
    for library, make in cases.items():
        rows = [compare(case) for case in make()]
        for row in rows:
            print(f"{library:<20} {row['case']:<90} {row['largest difference']:.1e}")
        result["libraries"][library] = {"version": version(library), "reader": digest(LIBRARIES[library]),
                                        "cases": rows}
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
