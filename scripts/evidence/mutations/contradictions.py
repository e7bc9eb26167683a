"""Bundles whose files or graph contradict their manifest. Each must be refused (exit 2), naming what it names.

Here nothing is repaired afterwards, unless the contradiction lies behind the hashes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from evidence.mutations.mutation import sign
from gqa_export.bundle.manifest import DATA, MANIFEST, MODEL, Manifest, read_manifest
from gqa_export.graph_io import past_names, present_names


@dataclass(frozen=True)
class Contradiction:
    """change(folder) breaks a copy of a bundle; `NotHere` if that has nothing to break. The refusal must have the code
    `code` and name every one of `facts`. opens: the checkpoint is opened again for it, because what it says is held
    against the manifest then. text: so is the calibration text. breaks: against what it is held."""

    name: str
    change: Callable[[Path], None]
    code: str
    facts: tuple[str, ...]
    opens: bool = False
    text: bool = False
    breaks: str = "files or graph against the manifest"


def contradict(bundle: Path, folder: Path, one: Contradiction) -> Path:
    """Copy `bundle` into the new `folder` and break it there."""
    shutil.copytree(bundle, folder)
    one.change(folder)
    return folder


def _data(folder: Path) -> Path:
    return folder / DATA


def _bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _claim(change: Callable[[Manifest], Manifest]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / MANIFEST).write_text(change(read_manifest(folder)).to_json(), encoding="utf-8")
    return edit


def _layer(**facts) -> Callable[[Path], None]:
    """The manifest states something else about layer 1. A fact may be a function of the layer."""
    def change(manifest: Manifest) -> Manifest:
        layers = list(manifest.spec.layers)
        changed = {name: fact(layers[1]) if callable(fact) else fact for name, fact in facts.items()}
        layers[1] = replace(layers[1], **changed)
        return replace(manifest, spec=replace(manifest.spec, layers=tuple(layers)))
    return _claim(change)


def _signed(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    """The graph is another one, its hash repaired."""
    def edit(folder: Path) -> None:
        model = onnx.load(str(folder / MODEL), load_external_data=False)
        change(model)
        onnx.save(model, str(folder / MODEL))
        sign(folder, read_manifest(folder))
    return edit


def _input_renamed(model: onnx.ModelProto) -> None:
    old, new = past_names(1)[0], "past_key_values.1.keys"
    for port in model.graph.input:
        port.name = new if port.name == old else port.name
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = new if name == old else name


def _output_dropped(model: onnx.ModelProto) -> None:
    place = next(i for i, port in enumerate(model.graph.output) if port.name == present_names(1)[1])
    del model.graph.output[place]


def _data_elsewhere(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"


def _cut(folder: Path) -> None:
    content = _data(folder).read_bytes()
    _data(folder).write_bytes(content[:-64])


def _cut_and_signed(folder: Path) -> None:
    _cut(folder)
    sign(folder, read_manifest(folder))


def _no_format(folder: Path) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(data | {"format": 99}))


CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction("a bit of the weights flipped", lambda f: _bit(_data(f)), "E-BUNDLE-HASH", (DATA,)),
    Contradiction("a bit of the graph flipped", lambda f: _bit(f / MODEL), "E-BUNDLE-HASH", (MODEL,)),
    Contradiction("weights cut short", _cut, "E-BUNDLE-FILE-SIZE", (DATA,)),
    Contradiction("weights cut short, hash repaired", _cut_and_signed, "E-BUNDLE-WEIGHT", (MODEL, DATA)),
    Contradiction("weights missing", lambda f: _data(f).unlink(), "E-BUNDLE-FILE", (DATA,)),
    Contradiction("graph missing", lambda f: (f / MODEL).unlink(), "E-BUNDLE-FILE", (MODEL,)),
    Contradiction("manifest of another format", _no_format, "E-BUNDLE-FORMAT", (MANIFEST, "99")),
    Contradiction("another window in the manifest", _layer(window=77), "E-BUNDLE-CLAIM",
                  ("layer 1", "window", "77")),
    Contradiction("another scale in the manifest", _layer(scale=0.5), "E-BUNDLE-CLAIM", ("layer 1", "scale")),
    Contradiction("another softcap in the manifest", _layer(softcap=9.0), "E-BUNDLE-CLAIM",
                  ("layer 1", "softcap")),
    Contradiction("other query heads in the manifest", _layer(num_heads=lambda layer: 2 * layer.num_heads),
                  "E-BUNDLE-CLAIM", ("layer 1", "num_heads")),
    Contradiction("other key/value heads in the manifest", _layer(kv_num_heads=1), "E-BUNDLE-MANIFEST",
                  (past_names(1)[0], "heads")),
    Contradiction("a cache input renamed", _signed(_input_renamed), "E-BUNDLE-INTERFACE",
                  ("input", past_names(1)[0])),
    Contradiction("a cache output dropped", _signed(_output_dropped), "E-BUNDLE-INTERFACE",
                  ("output", present_names(1)[1])),
    Contradiction("weights outside the bundle", _signed(_data_elsewhere), "E-BUNDLE-WEIGHT",
                  (MODEL, "../elsewhere.data")),
    Contradiction("another number format in the manifest",
                  _claim(lambda m: replace(m, inputs=tuple(replace(f, dtype="float16") if f.dtype == "float32" else f
                                                           for f in m.inputs))),
                  "E-BUNDLE-MANIFEST", ("input", "float16")),
)
