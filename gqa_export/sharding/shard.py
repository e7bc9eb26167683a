"""A traced model cut over ranks: the plan once, then the canonical graph of each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..lowering.context import Context, LowerOptions
from ..lowering.prepare import prepare
from ..targets import get_target
from .entries import plain_entries
from .flow import Flow, follow
from .plan import Plan, plan_sharding
from .products import plain_products
from .rewrite import RankGraph

if TYPE_CHECKING:
    import onnx

    from ..spec import ModelSpec


@dataclass(frozen=True)
class Sharded:
    """A model cut over ranks. model: the traced one. plan, flow: what is cut, and where ranks meet."""

    model: onnx.ModelProto
    plan: Plan
    flow: Flow

    def spec(self, rank: int) -> ModelSpec:
        """What the graph of a rank is."""
        return self.plan.rank_spec(rank)

    def graph(self, rank: int) -> onnx.ModelProto:
        """The canonical model of a rank, weights as recipes of their parts."""
        return RankGraph(self.plan, self.flow, rank).model(self.model)


def shard(model: onnx.ModelProto, spec: ModelSpec, options: LowerOptions, ranks: int) -> Sharded:
    """Cut a traced model over ranks.

    Args:
        model: canonical, weights as recipes. It is not changed.
        spec: of that model.
        options: of the lowering that follows.
        ranks: 2 or more.

    Raises:
        UnsupportedModel: it cannot be cut; names the layer and the operator.
    """
    model = plain_entries(plain_products(model))  # of a copy
    typed = prepare(model, (), Context(spec, get_target(options.target), options, model))
    plan = plan_sharding(typed, spec, ranks)
    return Sharded(model, plan, follow(plan))
