"""What a bundle is compared with, and what of the bundle is run: the checkpoint in PyTorch; the bundle itself, its fp32
twin, or an engine's graph in a form that ONNX Runtime can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.graph_file import read_graph
from ..bundle.manifest import Manifest
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.lora import merge_into
from ..files.scratch import scratch_folder
from ..progress import Progress
from ..runtime.session import Session
from ..targets import get_target, on_cpu
from .exact_inputs import check_exact_inputs
from .input_codes import StatedInputs, stated_inputs
from .quantization_claims import check_weights_are_as_stated
from .quantized_reference import kept_codes, put_quantized, requantized
from .ranks import merged_bundle, with_held_heads
from .sessions import observed_facts, pytorch_sessions
from .stand_in import stand_in

if TYPE_CHECKING:
    from ..bundle.parallel import ParallelFacts
    from ..targets import Target


@dataclass(frozen=True)
class Reference:
    """A checkpoint opened for comparison.

    session: PyTorch in fp64, the reference (fp32 where fp64 does not fit). eager: PyTorch in the number format that is
    run, the same-dtype baseline; None where there is no room. dtype: of `session`. model: the module. shown: see
    `observed_facts`. checkpoint: that was opened. digest: of it, see `model_digest`."""

    session: Session
    eager: Session | None
    dtype: str
    model: Any
    shown: dict[str, object]
    checkpoint: Checkpoint
    digest: str = ""
    plain: bool = True
    """neither its cache nor its weights were quantized to be what the bundle is meant to hold"""
    inputs: StatedInputs = field(default_factory=StatedInputs)
    """how products round their inputs to the type of their weight, in a bundle that does so"""

    def base(self, manifest: Manifest) -> Checkpoint:
        """The checkpoint that was quantized: without an adapter that the bundle can switch to."""
        return replace(self.checkpoint, adapter=None) if manifest.source.get("adapters") else self.checkpoint

    @property
    def alike(self) -> frozenset[int]:
        """Numbers of the layers whose keys, values and cache are compared."""
        found: Any = self.shown["alike"]
        return found


def runnable(stack: ExitStack, folder: Path, manifest: Manifest, ran_dtype: str, notes: list[str],
             report: Progress) -> tuple[Manifest, Path, Target]:
    """What is run for a bundle, while `stack` is open: the bundle itself, its fp32 twin where another format
    is wanted, and of an engine's graph, as long as no engine was built, a form that ONNX Runtime can run."""

    ran, where, target = manifest, folder, get_target(manifest.target)
    if manifest.parallel is not None and manifest.engine is None:
        report("putting the ranks together", None, None)
        ran, where = stack.enter_context(merged_bundle(folder, manifest, notes))
    if ran_dtype != manifest.dtype:
        report("widening to fp32", None, None)
        ran, where = stack.enter_context(_twin(where))
    if target.engine and manifest.engine is None:
        ran, where = stack.enter_context(_interpreted(where, ran, notes))
        target = on_cpu(target)
    return ran, where, target


def open_reference(against: str | Path | Checkpoint, manifest: Manifest, ran_dtype: str, notes: list[str],
                   calibrate: Path | None = None, folder: Path | None = None) -> Reference:
    """Open a checkpoint for comparison with bundles like this one.

    Args:
        against: checkpoint folder, hub id, .gguf file, or a checkpoint that is open.
        manifest: of the bundle.
        ran_dtype: number format in which the bundle is run: "float32", "float16" or "bfloat16".
        notes: takes a line where there is no room for fp64, and where scales of inputs could not be measured again.
        calibrate: the calibration text of a bundle whose weights were quantized with one.
        folder: of the bundle, which may hold what that text said.

    Raises:
        InvalidCheckpoint: it cannot be read, or its own logits are NaN.
        InvalidBundle: the manifest says of a quantized weight what the checkpoint does not allow.
        NotCheckedHere: two fp32 models do not fit in memory.
    """
    from ..bundle.source_checkpoint import open_for
    from ..checkpoint.content import model_digest

    checkpoint = open_for(manifest, against)
    session, eager, dtype = pytorch_sessions(checkpoint, manifest, ran_dtype, notes)
    # weights are quantized without an adapter that a bundle can switch to, which is added to what they stand for
    beside = checkpoint.adapter if manifest.source.get("adapters") else None
    base = checkpoint if beside is None else replace(checkpoint, adapter=None)
    matrices = requantized(base, manifest, calibrate, folder)
    models: list[Any] = [session, *([eager] if eager is not None else [])]
    named = dict(session.model.named_parameters(remove_duplicate=False))
    check_weights_are_as_stated(base, manifest, named, matrices)
    put_quantized((one.model for one in models), matrices)
    parameters = set(named)
    if ran_dtype != manifest.dtype:
        put_quantized((one.model for one in models), kept_codes(base, manifest, parameters))
    if beside is not None:
        for one in models:
            merge_into(one.model, beside.part(matrices))
    check_exact_inputs(base, manifest, session.model, matrices, folder)
    inputs = stated_inputs(base, manifest, parameters, notes, calibrate, folder)
    return Reference(session, eager, dtype, session.model, observed_facts(session, str(against)), checkpoint,
                     model_digest(checkpoint), plain=manifest.kv_cache is None and not matrices, inputs=inputs)


def with_ranks(known: Reference, parallel: ParallelFacts) -> Reference:
    """A reference for a model that is cut: keys, values and cache have the heads that ranks hold."""
    return replace(known, session=with_held_heads(parallel, known.session),
                   eager=with_held_heads(parallel, known.eager) if known.eager else None)


@contextmanager
def _twin(folder: Path) -> Iterator[tuple[Manifest, Path]]:
    from .fp32_twin import write_twin

    with scratch_folder("twin") as place:
        yield write_twin(folder, place), place


@contextmanager
def _interpreted(folder: Path, manifest: Manifest, notes: list[str]) -> Iterator[tuple[Manifest, Path]]:
    """A folder with the bundle's graph as ONNX Runtime can run it, its weights linked (copied where that fails)."""
    from ..lowering.tensorrt.interpret import interpret

    model = read_graph(folder)
    count = interpret(model)
    how = f"{count} plugin nodes interpreted by the op's function body" if count else "as it is"
    notes.append(f"the ONNX graph was run in fp32 by ONNX Runtime, {how}: no TensorRT engine was built or run")
    if manifest.kv_cache is not None and manifest.kv_cache.codes == "fp8":  # its cache is of numbers there
        coded = manifest.kv_cache.dtype
        wide = [tuple(replace(fact, dtype="float32") if fact.dtype == coded else fact for fact in facts)
                for facts in (manifest.inputs, manifest.outputs)]
        manifest = replace(manifest, kv_cache=None, inputs=wide[0], outputs=wide[1])
    with stand_in(folder, manifest, model, "interpreted") as found:
        yield found
