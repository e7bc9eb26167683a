"""Options with a closed set of words, which also understand how other tools spell them. Imports click only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

import click


class Words(click.Choice[str]):
    """A choice that takes other spellings of its words, and names the nearest one of a word that it does not know.

    Args:
        choices: the words themselves, as help shows them.
        spellings: other spellings, each with the word that it stands for.
        hints: words that stand for none of the choices, each with what to choose instead.
    """

    def __init__(self, choices: Sequence[str], spellings: Mapping[str, str], hints: Mapping[str, str]) -> None:
        super().__init__(choices)
        self.spellings, self.hints = spellings, hints

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word that a value stands for; click's own error, with a hint, for any other value."""
        word = self.spellings.get(value.lower(), value)
        if word in self.choices:
            return word
        near = get_close_matches(value, [*self.choices, *self.spellings], 1)
        hint = self.hints.get(value.lower(), f"did you mean {near[0]}?" if near else "")
        self.fail(f"{value!r} is not one of {', '.join(self.choices)}." + (f" {hint}" if hint else ""), param, ctx)


QUANTIZED = ("Weights are quantized with --quantize int4, int8, fp8 or nvfp4; --dtype is the format of everything "
             "else: fp32, fp16 or bf16")
DTYPE = Words(["auto", "fp32", "fp16", "bf16"],
              {"float32": "fp32", "float": "fp32", "f32": "fp32", "float16": "fp16", "half": "fp16", "f16": "fp16",
               "bfloat16": "bf16"},
              dict.fromkeys(("int4", "int8", "fp8", "nvfp4", "q4", "q8", "nf4"), QUANTIZED))
"""of `--dtype`"""
TARGET = Words(["ort", "onnx", "portable", "trt-plugin", "trt-native"],
               {"onnxruntime": "ort", "trt_plugin": "trt-plugin", "trt_native": "trt-native"},
               dict.fromkeys(("tensorrt", "trt", "rtx"), "Did you mean trt-plugin or trt-native?"))
"""of `--target`"""
VERB_OF = {"export": "onnx", "build": "trt", "engine": "trt", "check": "validate", "verify": "validate",
           "compare": "validate", "generate": "run", "chat": "run", "benchmark": "bench", "info": "inspect",
           "train": "uptrain", "finetune": "uptrain", "list": "models"}
"""what other tools call a command, and its name here"""
