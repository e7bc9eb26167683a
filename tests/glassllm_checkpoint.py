"""The small real model of the `glassllm` package as a Hugging Face Llama checkpoint.

glassllm stores matrices (in, out) in fp16 and rotates neighbouring pairs (2i, 2i + 1) of a head; Llama in
transformers stores (out, in) and rotates (i, i + D/2): so matrices are transposed, and the rows of the query and key
projections reordered, which changes no dot product of a query with a key.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np

BLOCK = {
    "norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm",
    "attn.W_Q": "self_attn.q_proj", "attn.W_K": "self_attn.k_proj", "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj", "ffn.W1": "mlp.gate_proj", "ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj",
}  # fmt: skip


def glassllm_weights(language: str = "en") -> Path:
    """Where the installed package keeps a model's npz ("en" or "pt"); ModuleNotFoundError without the package."""
    found = importlib.util.find_spec("glassllm")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("glassllm is not installed (pip install glassllm==0.1.0)")
    return Path(found.submodule_search_locations[0]) / "weights" / f"{language}.npz"


def write_glassllm(folder: Path | str, language: str = "en", dtype: str = "float16") -> Path:
    """Write the model as config.json, generation_config.json, tokenizer.json and model.safetensors into `folder`."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(glassllm_weights(language)) as data:
        facts = json.loads(str(data["__config__"]))
        arrays = {name: data[name] for name in data.files if name != "__config__"}
    head_size = facts["d_model"] // facts["n_heads"]
    tensors = {"model.embed_tokens.weight": arrays["E"], "model.norm.weight": arrays["norm_f.gamma"]}
    for layer in range(facts["n_layers"]):
        for theirs, ours in BLOCK.items():
            value = arrays[f"blocks.{layer}.{theirs}"]
            if value.ndim == 2:
                value = value.T
            if theirs in ("attn.W_Q", "attn.W_K"):
                value = pairs_to_halves(value, head_size)
            tensors[f"model.layers.{layer}.{ours}.weight"] = value
    save_file({name: np.ascontiguousarray(value.astype(dtype)) for name, value in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "hidden_act": "silu",
        "vocab_size": facts["vocab_size"], "hidden_size": facts["d_model"], "num_hidden_layers": facts["n_layers"],
        "intermediate_size": arrays["blocks.0.ffn.W1"].shape[1], "num_attention_heads": facts["n_heads"],
        "num_key_value_heads": facts["n_kv_heads"], "head_dim": head_size, "rms_norm_eps": facts["eps"],
        "max_position_embeddings": facts["max_len"], "tie_word_embeddings": True, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["rope_base"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    generation = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    _write_tokenizer(folder, language)
    return folder


def pairs_to_halves(weight: np.ndarray, head_size: int) -> np.ndarray:
    """Reorder the rows of a [heads * head_size, in] projection from pairs (2i, 2i + 1) to halves (i, i + size / 2)."""
    rows = weight.reshape(-1, head_size // 2, 2, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(folder: Path, language: str) -> None:
    """The package's character BPE as a `tokenizers` file: NFC, spaces as U+2581, chunks that merges do not cross."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    theirs = json.loads((glassllm_weights(language).parent / f"{language}.tokenizer.json").read_text(encoding="utf-8"))
    specials = ["<pad>", "<unk>", "<bos>", "<eos>"]
    pieces = specials + theirs["alphabet"] + [left + right for left, right in theirs["merges"]]
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        vocabulary[piece] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in theirs["merges"]],
                                     unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "\u2581")])
    chunk = Regex("\n|\u2581*[^\u2581\n]+|\u2581+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(chunk, behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("\u2581", " ")])
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
             "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
