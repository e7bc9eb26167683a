"""The process that builds: `python -m gqa_export.engine.build_child`, a job on standard input, messages on standard
output.

A process of its own because TensorRT's parser ends the process when it cannot find its own library, because the
search path for it must be set before a process starts, and because whatever else goes wrong in there must not take
the command line with it. Everything that TensorRT, Polygraphy and C++ print goes to standard error, line by line.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..errors import GqaExportError, cause_of
from .build_job import SEE_LOG, Built, Job, Tensor

ALIASED_IO = "ALIASED_PLUGIN_IO_10_03"


def main() -> int:
    """Read the job, build, report the result."""
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(os.dup(2), "w", buffering=1)
    job = Job.from_json(sys.stdin.read())

    def send(**message: Any) -> None:
        try:
            messages.write(json.dumps(message) + "\n")
        except BrokenPipeError:  # the parent ended
            os._exit(1)

    try:
        send(built=asdict(run(job, lambda text, done, total: send(progress=[text, done, total]))))
    except GqaExportError as error:
        send(refused=[error.what, error.where, error.fix, error.code])
        return 2
    return 0


def run(job: Job, report: Any) -> Built:
    """Build the engine of a job.

    Raises:
        GqaExportError: TensorRT cannot be imported or does not build the engine, or the plugin refuses a layer.
    """
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if job.flavor == "rtx" else "0"
    try:
        trt = importlib.import_module(job.module)
    except (ImportError, OSError) as error:
        raise GqaExportError(f"{job.module} cannot be imported: {error}", f"--flavor {job.flavor}",
                             "its shared libraries are missing: pip install 'gqa-export["
                             f"{'rtx' if job.flavor == 'rtx' else 'trt'}]'", code="E-ENV-TENSORRT") from error
    sys.modules[job.canonical] = trt
    if find_spec("tensorrt") is None:  # Polygraphy 0.53 imports it in places, whichever flavour is used
        sys.modules["tensorrt"] = trt
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath, PostprocessNetwork
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ULTRA_VERBOSE
    plugin = _register(trt, job)
    seen: dict[str, Any] = {}
    # Types are the graph's; TensorRT 11 and TensorRT for RTX know no other way, TensorRT 10 is told.
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    network = PostprocessNetwork(NetworkFromOnnxPath(job.model, strongly_typed=typed),
                                 lambda network: _look(trt, network, job, seen))
    start = time.monotonic()
    try:
        cache = job.timing_cache or None
        data = EngineBytesFromNetwork(network, _config(trt, job, report), save_timing_cache=cache)()
    except PolygraphyException as error:
        raise plugin.failures[0] if plugin.failures else GqaExportError(
            f"{job.canonical} could not build the engine: {cause_of(error)}", job.model,
            SEE_LOG, code="E-ENGINE-BUILD") from error
    view = memoryview(data)
    with open(job.engine, "wb") as file:
        file.write(view)
    return Built(trt.__version__, seconds=time.monotonic() - start, containers=_containers(view), **seen)


def _register(trt: ModuleType, job: Job) -> ModuleType:
    from gqa_plugins.grouped_attention import tensorrt as plugin

    if job.kernels is not None:
        with open(job.kernels.container, "rb") as file:
            container = file.read()
        keys = {name: {int(capability): sha for capability, sha in by.items()} for name, by in job.kernels.keys.items()}
        plugin.register(trt, plugin.Kernels(keys, container))
    return plugin


def _containers(engine: memoryview) -> int:
    """How often the container of the plugin's kernels is in the engine."""
    from gqa_plugins.grouped_attention.fields import MAGIC

    return bytes(engine).count(MAGIC + b"\n")


def _config(trt: ModuleType, job: Job, report: Any) -> Any:
    from polygraphy.backend.trt import PostprocessConfig, Profile

    profiles = []
    for _, shapes in job.profiles:
        profile = Profile()
        for name, (least, usual, most) in shapes.items():
            profile.add(name, tuple(least), tuple(usual), tuple(most))
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles, "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "progress_monitor": _monitor(trt, report), "strip_plan": job.strip_weights,
    }
    if job.timing_cache and os.path.exists(job.timing_cache):
        options["load_timing_cache"] = job.timing_cache
    if job.workspace_bytes:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: job.workspace_bytes}
    if job.flavor == "rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX as Create

        options.update({"compute_capabilities": [divmod(number, 10) for number in job.capabilities]}
                       if job.capabilities else {"use_gpu": True})
    else:
        from polygraphy.backend.trt import CreateConfig as Create

    def alias(builder: Any, network: Any, config: Any) -> None:
        config.set_preview_feature(getattr(trt.PreviewFeature, ALIASED_IO), True)

    return PostprocessConfig(Create(**options), alias)


def _monitor(trt: ModuleType, report: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        """Passes on the phases that TensorRT reports; nothing it raises may reach TensorRT."""

        def __init__(self) -> None:
            super().__init__()
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.totals[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(phase_name, step + 1, self.totals.get(phase_name))
            return True

        def phase_finish(self, phase_name: str) -> None:
            report(phase_name, self.totals.get(phase_name), self.totals.get(phase_name))

    return Monitor()


def _look(trt: ModuleType, network: Any, job: Job, seen: dict[str, Any]) -> None:
    """Note the network's inputs, outputs, attention layers and aliases; allow decomposition where the job does."""
    aliases: dict[str, str] = {}
    plugins = attentions = 0
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.PLUGIN_V3:
            plugins += 1
            layer.__class__ = trt.IPluginV3Layer
            plugin = layer.plugin
            for output in range(layer.num_outputs):
                source = plugin.get_aliased_input(output)
                if source >= 0:
                    aliases[layer.get_output(output).name] = layer.get_input(source).name
        elif layer.type == getattr(trt.LayerType, "KV_CACHE_UPDATE", None):
            aliases[layer.get_output(0).name] = layer.get_input(0).name
        elif layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
            attentions += 1
            if job.decomposable:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True
    tensors = {"inputs": [network.get_input(i) for i in range(network.num_inputs)],
               "outputs": [network.get_output(i) for i in range(network.num_outputs)]}
    for name, found in tensors.items():
        seen[name] = tuple(Tensor(tensor.name, tensor.dtype.name, tuple(tensor.shape)) for tensor in found)
    shown = {tensor.name for tensor in seen["outputs"]}
    # a layer without a cache writes into its owner's present, which lies in the past already, and shows nothing
    aliases = {name: source for name, source in aliases.items() if name in shown or source not in aliases}
    seen.update(aliases=aliases, plugin_layers=plugins, attention_layers=attentions)


if __name__ == "__main__":
    sys.exit(main())
