"""Engines built by TensorRT for RTX, and what holds for every one of them.

Each feature of a layer is built for one capability, not always the same; that an engine serves several at once is shown
by the kinds of models (test_rtx_plugin.py, test_rtx_native.py), for 8.0, 8.9 and 12.0 in one build each.

Without a GPU an engine is known by TensorRT's build log only: inputs and outputs, plugin layers per profile, no
copies, the plugin's own alias map, the size. Whether it computes the right thing is shown on the graph
(tests/lowering) and on a GPU (scripts/gpu_check.py).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from gqa_plugins.grouped_attention import fields

from gqa_export import attention_op
from gqa_export.bundle.engine_facts import ENGINE
from gqa_export.bundle.manifest import read_manifest
from gqa_export.engine.build import EngineBuild, EngineOptions, build_engine
from gqa_export.graph_io import past_names, present_names

CAPABILITIES = (80, 89, 120)
"""that an engine is built for if none are named"""
BATCH, PROMPT = 2, 32


def build(bundle: Path, output: Path, capabilities: tuple[int, ...] = (), **options) -> EngineBuild:
    options["capabilities"] = tuple(f"{number // 10}.{number % 10}" for number in capabilities)
    return build_engine(bundle, output, EngineOptions(max_batch=BATCH, max_prompt=PROMPT, **options))


def check(built: EngineBuild, bundle: Path, attention: str, capabilities: tuple[int, ...] = CAPABILITIES) -> None:
    """Everything that holds for every engine."""
    manifest, facts = read_manifest(built.folder), built.facts
    assert manifest.engine == facts
    assert facts.flavor == "rtx"
    assert facts.version.startswith("1.")
    assert facts.compute_capabilities == capabilities
    assert facts.attention == attention
    layers = manifest.spec.layers
    pairs = [zip(present_names(layer.layer), past_names(layer.layer)) for layer in manifest.spec.owners]
    assert facts.aliases == {present: past for pair in pairs for present, past in pair}
    assert [profile.name for profile in facts.profiles] == ["decode", "prefill"]
    assert facts.max_batch == BATCH
    assert facts.max_prompt == PROMPT
    assert facts.profiles[0].shapes["input_ids"] == ((1, 1), (1, 1), (BATCH, 1))
    assert facts.build["log_read"]
    for kinds in facts.build["layers"].values():
        assert kinds.get("PluginV3", 0) == (len(layers) if attention == "plugin" else 0)
        assert "Reformat" not in kinds
    engine = built.folder / ENGINE
    weights = (bundle / "model.onnx.data").stat().st_size
    # Weights may be laid out anew for each profile; the rest is code made for every layer, profile and capability.
    assert engine.stat().st_size < 2 * weights + facts.build["kernel_bytes"] + (8 << 20) * len(layers)
    assert manifest.files[ENGINE].size == engine.stat().st_size
    assert not list(built.folder.parent.glob(".*partial*"))


def check_plugin(built: EngineBuild, bundle: Path, variants: int,
                 capabilities: tuple[int, ...] = CAPABILITIES) -> None:
    """What holds with the plugin: which one, and its kernels once."""
    check(built, bundle, "plugin", capabilities)
    facts, data = built.facts, (built.folder / ENGINE).read_bytes()
    assert facts.plugin is not None
    named = (facts.plugin.namespace, facts.plugin.name, facts.plugin.version)
    assert named == (attention_op.DOMAIN, attention_op.OP, "3" if built.manifest.kv_cache else "1")
    assert facts.plugin_layers == len(built.manifest.spec.layers)
    assert data.count(fields.MAGIC + b"\n") == 1
    start = data.index(fields.MAGIC + b"\n")
    container = data[start:start + facts.build["kernel_bytes"]]
    files = fields.unpack(container)
    assert hashlib.sha256(container).hexdigest() == facts.plugin.sha256
    assert len(files) == variants * len(capabilities)
    for name in files:  # every layer of both profiles names the kernels that it launches
        assert data.count(name.encode()) >= 1 + 2
