"""A lighter capture than torch.export: one symbolic pass, already in the ops that the translation to ONNX knows.

torch.export traces a model twice, once to record it and once to decompose what it recorded, and functionalises both
times; for two decoder layers that is three quarters of an export's time. Here `make_fx` records the decomposed ops at
once. What torch.export would prove about sizes is proved here as well: every guard that tracing relied on must hold at
all sizes the graph is meant for (`check_guards`), else `NotCaptured`, and the caller takes torch.export's way.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._guards import GuardSource, SLoc, Source

from . import functionalize

BATCHES = (1, 2, 7, 64)
NEW = (1, 2, 3, 16, 127, 4096)
PAST = (0, 1, 5, 100, 4095, 4096, 131072)


class NotCaptured(Exception):
    """The light capture does not apply; the message says why."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of the graph: an example, and which of its dimensions vary, by role ("batch", "new", ...)."""

    name: str
    example: torch.Tensor
    dims: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class _Named(Source):
    """Where a symbol comes from: an input of the graph."""

    label: str

    @property
    def _name_template(self) -> str:
        return self.label

    @property
    def name(self) -> str:
        return self.label

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT


def capture(module: torch.nn.Module, inputs: Sequence[Input], table: Mapping[Any, Any], kept: Sequence[Any],
            points: Sequence[Mapping[str, int]]) -> tuple[torch.fx.GraphModule, dict[str, str]]:
    """Record `module(*inputs)`. Returns the fx graph and the name of the weight or input of each placeholder.

    table: decompositions; kept: composite ops that stay whole; points: sizes by role at which every guard must hold.
    Examples of equal size in dimensions that vary must have one role: equal sizes share a symbol.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._export.utils import _special_op_to_preserve_cia
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export.exported_program import _override_composite_implicit_decomp
    from torch.fx.experimental import _config
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    environment = ShapeEnv(duck_shape=True)
    # Which line of a model needed a size appears in messages only; to find it, PyTorch imports its compiler.
    environment._get_stack_summary = lambda *given, **named: (SLoc(None, None), "")  # type: ignore[method-assign]
    fake = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    fake.cache_enabled = False  # two layers ask too little twice for what keeping every answer costs
    roles: dict[Any, str] = {}
    examples = []
    for given in inputs:
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DUCK if place in given.dims else DimDynamic.STATIC
                           for place in range(given.example.dim())])
        example = fake.from_tensor(given.example, symbolic_context=context, source=_Named(given.name))
        for place, role in given.dims.items():
            roles[example.shape[place].node.expr] = role  # type: ignore[attr-defined]
        examples.append(example)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = {name: fake.from_tensor(tensor, static_shapes=True) for name, tensor in tensors.items()}

    def run(weights: dict[str, torch.Tensor], *examples: torch.Tensor) -> Any:
        return torch.func.functional_call(module, weights, examples, tie_weights=True)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_config.patch(backed_size_oblivious=True))  # type: ignore[attr-defined] # sizes 0 and 1 are sizes like others
        stack.enter_context(_override_composite_implicit_decomp(dict.fromkeys(kept, _special_op_to_preserve_cia)))
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(_scopes(module))
        graph = _record(run, fake, table, weights, examples)
        functionalize.settle(graph.graph)
        if functionalize.writes(graph.graph):  # a part of a tensor is filled: recorded again as a chain of new ones
            graph = _record(torch.func.functionalize(run), fake, table, weights, examples)
    check_guards(environment, roles, points)
    names = [*weights, *[given.name for given in inputs]]
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(names):
        raise NotCaptured(f"{len(placeholders)} placeholders for {len(names)} inputs")
    _hoist_sizes(graph.graph, placeholders)
    for node in graph.graph.nodes:
        if node.op == "get_attr":  # a tensor made while tracing: its value, not its fake, is what the graph holds
            node.meta["val"] = getattr(graph, node.target)
    return graph, {node.name: name for node, name in zip(placeholders, names)}


def _record(run: Any, fake: Any, table: Mapping[Any, Any], weights: Any,
            examples: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    # make_fx names triton_kernel_wrap, and leaves it to others to import it.
    import torch._higher_order_ops.triton_kernel_wrap  # noqa: F401
    from torch.fx.experimental import proxy_tensor
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake, _without_layouts(proxy_tensor):
        return make_fx(run, decomposition_table=dict(table), tracing_mode="real", _allow_non_fake_inputs=True)(
            weights, *examples)


@contextmanager
def _without_layouts(proxy_tensor: Any) -> Iterator[None]:
    """Inside, PyTorch does not find out the memory format of each result for `node.meta["tensor_meta"]`, which nobody
    reads here: with symbolic sizes that takes a fifth of the recording."""
    extract = proxy_tensor._extract_tensor_metadata
    proxy_tensor._extract_tensor_metadata = lambda result: None
    try:
        yield
    finally:
        proxy_tensor._extract_tensor_metadata = extract


def _hoist_sizes(graph: torch.fx.Graph, placeholders: list[torch.fx.Node]) -> None:
    """A size of an input belongs to no module, though it is recorded in the first that reads it."""
    after = placeholders[-1]
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.sym_size.int and node.args[0].op == "placeholder":
            after.append(node)
            after = node
            node.meta["nn_module_stack"] = {"L0": ("", torch.nn.Module)}


@contextmanager
def _scopes(module: torch.nn.Module) -> Iterator[None]:
    """Give every recorded node the stack of modules it was recorded in, as torch.export does."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    names = {id(sub): name for name, sub in module.named_modules()}
    stack: list[tuple[str, type, Any]] = []

    def graph() -> Any:
        mode = get_proxy_mode()
        return mode.tracer.graph if mode is not None else None

    def enter(sub: torch.nn.Module, _: Any) -> None:
        here = graph()
        last = None if here is None else next(iter(reversed(here.nodes)), None)
        stack.append((names.get(id(sub), ""), type(sub), last))

    def leave(sub: torch.nn.Module, _: Any, __: Any) -> None:
        here = graph()
        scope = {f"L{place}": (name, kind) for place, (name, kind, _) in enumerate(stack)}
        *_, first = stack.pop()
        if here is None:
            return
        for node in reversed(here.nodes):
            if node is first:
                break
            node.meta.setdefault("nn_module_stack", scope)

    handles = [torch.nn.modules.module.register_module_forward_pre_hook(enter),
               torch.nn.modules.module.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_guards(environment: Any, roles: Mapping[Any, str], points: Sequence[Mapping[str, int]]) -> None:
    """Raise NotCaptured unless all that tracing assumed about sizes holds at every one of `points`."""
    import sympy

    for symbol in roles:
        if environment.replace(symbol) != symbol:
            raise NotCaptured(f"the size `{roles[symbol]}` was taken to be {environment.replace(symbol)}")
    if any(environment.deferred_runtime_asserts.values()):
        raise NotCaptured("tracing relied on values that are known only at run time")
    for guard in dict.fromkeys(guard.expr for guard in environment.guards):
        strangers = guard.free_symbols - set(roles)
        if strangers:
            raise NotCaptured(f"a condition on a size that does not come from an input: {guard}")
        symbols = [symbol for symbol in roles if symbol in guard.free_symbols]
        for sizes in dict.fromkeys(tuple(point[roles[symbol]] for symbol in symbols) for point in points):
            if guard.xreplace(dict(zip(symbols, map(sympy.Integer, sizes)))) != True:  # noqa: E712
                readable = guard.xreplace({symbol: sympy.Symbol(roles[symbol]) for symbol in symbols})
                at = ", ".join(f"{roles[symbol]} = {size}" for symbol, size in zip(symbols, sizes))
                raise NotCaptured(f"tracing took a branch that other sizes do not take: {readable} fails at {at}")


def sizes(growing: bool, edges: Sequence[int] = (), longest: int = 0) -> list[dict[str, int]]:
    """The sizes at which guards are tried: all of a grid, with `edges` (windows, capacity) among the lengths.

    longest: tokens that the model has positions for, 0 is any number. No more are tried: a table of
    positions that it would make longer (XGLM) is as good as fixed.
    """
    lengths = sorted({*PAST, *[edge + step for edge in (*edges, longest) for step in (-1, 0, 1) if edge + step > 0]})
    grid = []
    for batch, new, past in itertools.product(BATCHES, sorted({*NEW, longest or 1}), lengths):
        if not longest or (past + new if growing else max(past, new)) <= longest:
            grid.append({"batch": batch, "new": new, "past": past if growing else max(past, 1), "total": past + new})
    return grid
