"""The module that torch.export traces: a decoder with its cache as inputs and outputs.

Dimensions as in `gqa_export.attention_op`. The wrapped model is called without a cache of its own (with one that has no
content, where it keeps states), so new keys and values reach the attention function alone; this module answers each
attention call with the op over that layer's past, each convolution and recurrence with the op over its state, and
collects the presents.
"""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoint.cache_argument import cache_argument
from ...errors import UnsupportedModel
from ...spec import AttentionSpec, ModelSpec, StateSpec
from ..attention_hook import Call, recording
from ..probe import rotary
from ..states import ops
from ..states.stand_in_cache import Convolution, Recurrence, StandInCache, listening
from . import custom_op  # noqa: F401 registers the torch op


class Decoder(torch.nn.Module):
    """forward(input_ids [B, S], attention_mask [B, P + S], *past) -> (logits, *present); with `hidden` the last hidden
    states [B, S, X], after the final norm, follow the logits.

    With `interface="lengths"`: forward(input_ids, past_lengths int32 [B], new_lengths int32 [B], *past).
    `past` alternates key [B, K, P, D] and value [B, K, P, E], in the order of `spec.owners`, and ends with the states
    in the order of `spec.states`, [B, *shape]. logits: "all" gives [B, S, V]; "last" gives [B, 1, V], the last valid
    token of each row. A row whose mask has a 0 before a 1 among its new tokens (left padding) gives NaN logits.
    """

    def __init__(self, model: torch.nn.Module, spec: ModelSpec, *, cache: str, logits: str, interface: str,
                 hidden: bool = False) -> None:
        super().__init__()
        self.model = model
        self.specs = {layer.layer: layer for layer in spec.layers}
        self.owners = [layer.layer for layer in spec.owners]
        self.states = spec.states
        self.growing = int(cache == "growing")
        self.logits, self.interface, self.hidden, self._width = logits, interface, hidden, spec.hidden_size
        self._state: dict[str, Any] = {}
        self._rotary = rotary.states(model)
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._hooked = head is not None
        if head is not None:
            head.register_forward_pre_hook(lambda module, args: (self._before_head(args[0]), *args[1:]))
        if hidden:
            self._body().register_forward_hook(lambda module, args, answer: self._after_body(answer))

    def forward(self, input_ids: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        """See the class."""
        past: tuple[torch.Tensor, ...]
        if self.interface == "mask":
            attention_mask, *past_list = rest
            past = tuple(past_list)
            new_mask = attention_mask[:, -input_ids.shape[1]:]
            new_counts = new_mask.sum(1)
            past_lengths = (attention_mask.sum(1) - new_counts).to(torch.int32)
            new_lengths = new_counts.to(torch.int32)
            # Ones must come first: then the last one's place is their number (no slice, so S = 1 traces alike).
            places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
            left_padded_B = (new_mask * places).amax(1) != new_counts
        else:
            past_lengths, new_lengths, *past_list = rest
            past, left_padded_B = tuple(past_list), None
            new_counts = new_lengths.to(torch.int64) if self.states else new_lengths
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        position_ids = past_lengths[:, None].to(torch.int64) + steps
        self._state = {"past": past, "past_lengths": past_lengths, "new_lengths": new_lengths, "present": {}, "new": {},
                       "new_counts": new_counts, "left_padded": left_padded_B}
        for state in self._rotary:
            state["longest"] = past_lengths + new_lengths
        with recording(self, position_ids):
            logits = self._run(input_ids, position_ids)
        if not self._hooked:
            logits = self._before_head(logits)
        present = self._state["present"]
        hidden = [self._state["hidden"]] if self.hidden else []
        return (logits, *hidden, *[tensor for layer in self.owners for tensor in present[layer]],
                *[present[_key(state)] for state in self.states])

    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        model: Any = self.model
        if not self.states:
            return model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids,
                         use_cache=False).logits
        cache = StandInCache(self)
        mask = torch.ones_like(input_ids) if self.specs else None
        with listening(cache):
            logits: torch.Tensor = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids,
                                         use_cache=True, **{cache_argument(model): cache}).logits
        cache.finish()
        return logits

    def _body(self) -> torch.nn.Module:
        """The model without its head."""
        model: Any = self.model
        body = model.get_decoder() if self._hooked else None
        if body is None or body is model:
            raise UnsupportedModel("the model has no part before its head that gives hidden states",
                                   type(model).__name__, "leave out --hidden-states", code="E-MODEL-HIDDEN-STATES")
        return body

    def _after_body(self, answer: Any) -> Any:
        hidden_BSX = answer[0]
        if hidden_BSX.shape[-1] != self._width:
            raise UnsupportedModel(f"the hidden states before its head have size {hidden_BSX.shape[-1]}, and its "
                                   f"config.json says {self._width}", type(self.model).__name__,
                                   "leave out --hidden-states", code="E-MODEL-HIDDEN-STATES")
        self._state["hidden"] = self._guarded(hidden_BSX)
        if isinstance(answer, tuple):
            return (self._state["hidden"], *answer[1:])
        answer.last_hidden_state = self._state["hidden"]
        return answer

    def _guarded(self, hidden_BSX: torch.Tensor) -> torch.Tensor:
        """NaN where a row is padded on the left."""
        bad_B = self._state["left_padded"]
        if bad_B is None:
            return hidden_BSX
        nan = torch.full((), float("nan"), dtype=hidden_BSX.dtype)
        zero = torch.zeros((), dtype=hidden_BSX.dtype)
        return hidden_BSX + torch.where(bad_B, nan, zero)[:, None, None]

    def _before_head(self, hidden_BSX: torch.Tensor) -> torch.Tensor:
        if not self.hidden:
            hidden_BSX = self._guarded(hidden_BSX)
        if self.logits == "last":
            last_B = (self._state["new_lengths"].to(torch.int64) - 1).clamp(min=0)
            index_B1X = last_B[:, None, None].expand(-1, 1, hidden_BSX.shape[-1])
            hidden_BSX = torch.gather(hidden_BSX, 1, index_B1X)
        return hidden_BSX

    def attend(self, call: Call) -> torch.Tensor:
        """Answer one layer's attention with the op over its past; of a layer that reads another's keys and values, over
        that layer's past and what that layer adds to it, so that both have one present."""
        spec: AttentionSpec = self.specs[call.layer]
        order = self.owners.index(spec.cache)
        past_key, past_value = self._state["past"][2 * order: 2 * order + 2]
        if call.layer in self._state["present"]:
            raise UnsupportedModel("a layer calls attention more than once", f"layer {call.layer}",
                                   "such a model needs several key/value caches per layer, which is not supported",
                                   code="E-MODEL-ATTENTION-TWICE")
        sinks = call.sinks
        if sinks is None:
            sinks = torch.full((spec.num_heads,), float("-inf"), dtype=call.query.dtype)
        query = call.query.transpose(1, 2).flatten(2)
        if spec.owner is None:
            self._state["new"][call.layer] = [each.transpose(1, 2).flatten(2) for each in (call.key, call.value)]
        output, key, value = torch.ops.gqa.grouped_query_attention(
            query, *self._state["new"][spec.cache], past_key, past_value, self._state["past_lengths"],
            self._state["new_lengths"], None, None, sinks.to(query.dtype), spec.num_heads, spec.kv_num_heads,
            spec.scale, spec.softcap, spec.visible, 0, self.growing)
        self._state["present"][call.layer] = (key, value)
        return output.unflatten(2, (spec.num_heads, spec.value_head_size))

    def convolve(self, call: Convolution) -> torch.Tensor:
        """Answer a causal convolution with the op over its state, in fp32 whatever the activations."""
        state = self._take(call.layer, "conv", call.index)
        bias = None if call.bias is None else call.bias.float()
        y, new_state = ops.causal_conv(call.x.float(), call.weight.float(), bias, state, self._new_lengths(),
                                       activation=call.activation)
        self._state["present"][call.layer, "conv", call.index] = new_state
        return y.to(call.x.dtype)

    def recur(self, call: Recurrence) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer a linear recurrence with the op over its state."""
        state = self._take(call.layer, "recurrent", call.index)
        output, new_state = ops.linear_attention(call.query, call.key, call.value, call.decay, call.beta, state,
                                                 self._new_lengths(), rule=call.rule, scale=call.scale)
        self._state["present"][call.layer, "recurrent", call.index] = new_state
        return output, new_state

    def steps_alone(self) -> torch.Tensor:
        """bool [B]: the rows that bring one token to a past."""
        return (self._state["new_lengths"] == 1) & (self._state["past_lengths"] > 0)

    def _take(self, layer: int, kind: str, index: int) -> torch.Tensor:
        for place, state in enumerate(self.states):
            if _key(state) == (layer, kind, index):
                if (layer, kind, index) in self._state["present"]:
                    break
                return self._state["past"][2 * len(self.owners) + place]
        raise UnsupportedModel(f"a layer uses a {kind} state that it did not show when it was probed, or uses one "
                               "twice", f"layer {layer}", "what its layers keep changes from run to run; it is not "
                               "supported", code="E-MODEL-STATE-TWICE")

    def _new_lengths(self) -> torch.Tensor:
        return self._state["new_counts"]


def _key(state: StateSpec) -> tuple[int, str, int]:
    return state.layer, state.kind, state.index
