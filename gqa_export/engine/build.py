"""A TensorRT dialect bundle -> an engine bundle: choose, compile kernels, build in a child, check, write.

Every refusal comes before the long work where it can be known. An engine cannot be opened without a GPU, so it is
checked by the network and the build log: inputs and outputs, plugin layers per profile, aliases, copies of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import attention_op
from ..bundle.attention_claims import check_claims
from ..bundle.engine_facts import ENGINE, EngineFacts, PluginFacts, ProfileFacts
from ..bundle.graph_file import read_graph
from ..bundle.integrity import check_files
from ..bundle.long_facts import LONG_PLUGIN_VERSION, PREFILL
from ..bundle.manifest import MODEL, FileFact, Manifest, read_manifest
from ..bundle.rank_view import ranks_of
from ..bundle.writer import BundleWriter, check_output, writing_bundle
from ..environment.machine import nvidia
from ..environment.tensorrt_libraries import CANONICAL, Library
from ..errors import GqaExportError, InvalidBundle, NotCheckedHere
from ..files.scratch import scratch_folder
from ..files.sha256 import file_sha256
from ..progress import Progress, silent
from ..quantizing.importance import FILE as IMPORTANCE
from ..spec import DTYPES
from ..targets import TARGETS
from . import inspect_build
from .build_job import Built, Job, KernelFiles
from .build_log import lacks_kernel, read_log
from .choose_library import Choice, choose
from .code_types import cache_types_of, code_types_of, for_code_types
from .inspect_build import check_alike
from .kernels import Compiled, compile_kernels, wanted_variants
from .profiles import make_profiles
from .run_child import run_job
from .weight_bytes import weight_bytes_read

if TYPE_CHECKING:
    import onnx

WEIGHT_FILES = (".onnx", ".data", ".safetensors")


@dataclass(frozen=True)
class EngineOptions:
    """What `gqa-export trt` takes. capabilities: as given ("8.9"), () is the flavour's own choice. max_prompt 0: the
    capacity, at most 4096. workspace_mb 0: TensorRT's choice."""

    attention: str = ""
    dtype: str = "auto"
    capacity: int = 0
    flavor: str = "auto"
    capabilities: tuple[str, ...] = ()
    max_batch: int = 1
    max_prompt: int = 0
    timing_cache: Path | None = None
    strip_weights: bool = False
    workspace_mb: int = 0
    force: bool = False


@dataclass(frozen=True)
class EngineBuild:
    """What a build did. notes: everything that is not as a user would expect it."""

    folder: Path
    manifest: Manifest
    facts: EngineFacts
    notes: tuple[str, ...]


def attention_of(manifest: Manifest) -> str:
    """"plugin" or "native"; "" for a target that is not made for TensorRT."""
    target = TARGETS.get(manifest.target)
    if target is None or not target.engine:
        return ""
    return "plugin" if target.attention == f"{attention_op.DOMAIN}::{attention_op.OP}" else "native"


def check_bundle(bundle: Path, manifest: Manifest, options: EngineOptions) -> str:
    """The bundle's kind of attention, "plugin" or "native".

    Raises:
        GqaExportError: the bundle cannot become the engine that the options describe.
    """
    kind, source = attention_of(manifest), manifest.source.get("checkpoint", "CHECKPOINT")
    again = f"gqa-export onnx {source} -o DIR --target trt-{options.attention or kind or 'plugin'}"
    if manifest.engine is not None:
        raise GqaExportError("this bundle holds an engine already", str(bundle),
                             "pass the bundle or the checkpoint that it was built from", code="E-ENGINE-BUILT")
    if not kind:
        raise GqaExportError(f"a bundle of target {manifest.target} cannot become an engine: its cache is not made for "
                             "TensorRT", str(bundle), f"export it again: `{again}`, or pass the checkpoint",
                             code="E-ENGINE-TARGET")
    if options.attention and options.attention != kind:
        raise GqaExportError(f"the bundle has {kind} attention, and --attention is {options.attention}", str(bundle),
                             f"leave --attention out, or export it again: `{again}`", code="E-ENGINE-ATTENTION")
    if options.capacity and options.capacity != manifest.capacity:
        raise GqaExportError(f"the bundle's cache has a capacity of {manifest.capacity}, and --capacity is "
                             f"{options.capacity}", str(bundle),
                             f"leave --capacity out, or export it again: `{again} --capacity {options.capacity}`",
                             code="E-ENGINE-CAPACITY")
    wanted = DTYPES.get(options.dtype, manifest.dtype)
    if wanted != manifest.dtype:
        raise GqaExportError(f"the bundle is {manifest.dtype}, and --dtype is {options.dtype}", str(bundle),
                             f"leave --dtype out, or export it again: `{again} --dtype {options.dtype}`",
                             code="E-ENGINE-DTYPE")
    return kind


def is_named(options: EngineOptions, choice: Choice) -> bool:
    """Whether the capabilities are those that were asked for, or of the GPU at hand, and not a default."""
    return bool(options.capabilities) or choice.library.flavor == "tensorrt"


def check_request(output: Path, options: EngineOptions, kind: str) -> Choice:
    """Check, before any work, the output folder, the flavour, the capabilities and the prompt's length.

    Raises:
        GqaExportError: one of them cannot be; NotCheckedHere where the build needs a GPU that is not here.
    """
    check_output(output.absolute(), options.force)
    if options.capacity and options.max_prompt > options.capacity:
        raise GqaExportError(f"prompts of {options.max_prompt} tokens do not fit a cache of {options.capacity}",
                             "--max-prompt", "make --capacity larger or --max-prompt smaller", code="E-ENGINE-PROMPT")
    if options.timing_cache is not None and not options.timing_cache.absolute().parent.is_dir():
        raise GqaExportError("the timing cache's folder does not exist", str(options.timing_cache),
                             "make it, or name another file with --timing-cache", code="E-FILE-FOLDER")
    choice = choose(options.flavor, options.capabilities, plugin=kind == "plugin")
    if options.strip_weights and not nvidia()[1]:
        raise NotCheckedHere("without weights TensorRT compiles for the GPU at hand, and this machine has none",
                             "--strip-weights",
                             "run this on a machine with an NVIDIA GPU, or leave --strip-weights out",
                             code="E-ENV-GPU")
    return choice


def build_engine(bundle: Path, output: Path, options: EngineOptions | None = None,
                 report: Progress | None = None) -> EngineBuild:
    """Build an engine bundle.

    Args:
        bundle: a bundle of a `trt-*` target.
        output: the engine bundle's folder.
        options: None means the defaults.
        report: is told of the progress.

    Raises:
        GqaExportError: the bundle or an option does not fit, or TensorRT fails; NotCheckedHere where a GPU is needed
            and the machine has none. Nothing of the engine is left behind.
    """
    options, say = options or EngineOptions(), report or silent
    manifest = read_manifest(bundle)
    kind = check_bundle(bundle, manifest, options)
    choice = check_request(output, options, kind)
    make_profiles(manifest, options.max_batch, options.max_prompt)  # refuses what does not fit before anything is read
    say("checking the bundle", None, None)
    check_files(bundle, manifest)
    check_claims(bundle, manifest)  # an engine shows no graph: what it rounds and how is then known from the manifest
    _, first, one = next(iter(ranks_of(bundle, manifest)))  # those of other ranks have the same types
    graph, named = read_graph(first / (PREFILL if one.long else MODEL)), is_named(options, choice)
    choice = for_code_types(choice, code_types_of(graph), str(bundle), named=named,
                            kept=manifest.quantization is not None and manifest.quantization.method == "keep")
    choice = for_code_types(choice, cache_types_of(graph), str(bundle), kept=False, named=named, cache=True)
    with writing_bundle(output, force=options.force) as writer:
        built = [_rank(place, one, inside, kind, choice, options, writer, say)
                 for inside, place, one in ranks_of(bundle, manifest)]
        facts, notes = built[0]
        check_alike([each for each, _ in built], manifest)
        for name in manifest.files:
            if not name.endswith(WEIGHT_FILES) or name == IMPORTANCE:
                writer.copy(bundle / name, name)
        size = sum(writer.files[inside + ENGINE].size for inside, _, _ in ranks_of(bundle, manifest))
        versions = {**manifest.versions, CANONICAL[choice.library.flavor]: facts.version}
        manifest = writer.finish(replace(manifest, engine=facts, versions=versions, bytes_linked=0, bytes_copied=size,
                                         verdict=None))  # it was the graph's, and an engine is another program
    if manifest.spec.rope_switch:
        notes.append(f"longrope: where a sequence grows beyond {manifest.spec.rope_switch} tokens, feed it again as a "
                     "whole (`gqa-export run` does, the C++ runtime leaves it to its caller)")
    return EngineBuild(output, manifest, facts, (*choice.notes, *notes, *writer.notes))


def _rank(bundle: Path, manifest: Manifest, inside: str, kind: str, choice: Choice, options: EngineOptions,
          writer: BundleWriter, say: Progress) -> tuple[EngineFacts, list[str]]:
    """Build the engine of one graph into `inside` of the output. bundle, manifest: of that graph."""
    profiles = make_profiles(manifest, options.max_batch, options.max_prompt)
    with scratch_folder("engine") as scratch:
        graph = bundle / (PREFILL if manifest.long else MODEL)
        model = read_graph(graph)
        compiled = _kernels(model, graph, manifest, choice, say) if kind == "plugin" else None
        engine = writer.staging / inside / ENGINE
        engine.parent.mkdir(exist_ok=True)
        job = _job(graph, engine, choice, profiles, options, compiled, scratch)
        built, job, log = _build(job, choice.library, scratch / "build.log", say)
        say("checking the engine", None, None)
        facts, notes = _facts(manifest, kind, choice, profiles, compiled, built, job, log)
        listed = read_log(log)
        meetings = inspect_build.check_collectives(model, listed, len(profiles))
        coded, lines = inspect_build.coded_products(model, listed, [profile.name for profile in profiles])
        more = {**({"collectives": meetings} if meetings else {}), **({"products_of_codes": coded} if coded else {})}
        notes += lines
        facts = replace(facts, build={**facts.build, "weight_bytes_read": weight_bytes_read(model), **more})
        writer.record(inside + ENGINE, FileFact(engine.stat().st_size, file_sha256(engine)))
    return facts, notes


def _kernels(model: onnx.ModelProto, graph: Path, manifest: Manifest, choice: Choice, say: Progress) -> Compiled:
    variants = wanted_variants(model, manifest.capacity, manifest.dtype)
    if not variants:
        raise InvalidBundle("the bundle's graph has no attention layer of the plugin", str(graph),
                            "export the bundle again: `gqa-export onnx --target trt-plugin`",
                            code="E-ENGINE-NO-PLUGIN")
    return compile_kernels(variants, choice.kernel_capabilities, say)


def _job(graph: Path, engine: Path, choice: Choice, profiles: tuple[ProfileFacts, ...], options: EngineOptions,
         compiled: Compiled | None, scratch: Path) -> Job:
    kernels = None
    if compiled is not None:
        container = scratch / "kernels"
        container.write_bytes(compiled.container)
        keys = {name: {str(capability): sha for capability, sha in by.items()} for name, by in compiled.keys.items()}
        kernels = KernelFiles(keys, str(container))
    return Job(choice.library.flavor, choice.library.module, CANONICAL[choice.library.flavor],
               str(graph.absolute()), str(engine), choice.engine_capabilities,
               tuple((profile.name, profile.shapes) for profile in profiles), kernels,
               str(options.timing_cache.absolute()) if options.timing_cache else "", options.strip_weights,
               options.workspace_mb << 20)


def _build(job: Job, library: Library, log: Path, say: Progress) -> tuple[Built, Job, str]:
    """Build; once more, with attention that may be taken apart, where TensorRT has no kernel of its own for it."""
    try:
        built = run_job(job, library, log, say)
    except GqaExportError:
        if job.kernels is not None or not lacks_kernel(log.read_text(encoding="utf-8", errors="replace")):
            raise
        say("TensorRT has no attention kernel for this shape: building it from smaller layers", None, None)
        job = replace(job, decomposable=True)
        built = run_job(job, library, log, say)
    return built, job, log.read_text(encoding="utf-8", errors="replace")


def _facts(manifest: Manifest, kind: str, choice: Choice, profiles: tuple[ProfileFacts, ...],
           compiled: Compiled | None, built: Built, job: Job, log: str) -> tuple[EngineFacts, list[str]]:
    listed = read_log(log)
    inspect_build.check(manifest, built, listed, len(profiles), plugin=compiled is not None)
    notes = []
    if job.decomposable:
        notes.append("TensorRT has no attention kernel for this type and shape: attention is built from smaller layers "
                     "(slower; --attention plugin has no such limit)")
    if not listed.layers:
        notes.append("the build log lists no layers: copies of the cache could not be looked for")
    plugin = None
    if compiled is not None:
        version, contract = str(attention_op.VERSION), attention_op.VERSION
        if manifest.long:
            version = LONG_PLUGIN_VERSION
        elif manifest.kv_cache:
            version, contract = attention_op.CODES_PLUGIN_VERSION, attention_op.CODES_VERSION
        plugin = PluginFacts(attention_op.OP, version, attention_op.DOMAIN, contract, compiled.sha256)
    build = {"seconds": round(built.seconds, 1), "log_read": bool(listed.layers),
             "layers": {profile.name: listed.kinds(number) for number, profile in enumerate(profiles)},
             "kernel_bytes": len(compiled.container) if compiled else 0, "workspace_mb": job.workspace_bytes >> 20,
             "attention_layers": built.attention_layers}
    return EngineFacts(choice.library.flavor, built.version, choice.capabilities, kind, profiles,
                       inspect_build.expected_aliases(manifest), plugin, built.plugin_layers, job.decomposable,
                       job.strip_weights, ENGINE, build), notes
