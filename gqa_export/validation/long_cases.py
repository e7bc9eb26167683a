"""The graph for long prompts against PyTorch, with the graph's selection handed over.

What a row reads is a choice (the bits of a hash, the best blocks) that rounding may turn, and another choice is another
answer. So the comparison has two parts. The graph's choice is held against that of the fp64 reference: where they
differ it must have been a near tie, nearer than FACTOR times what PyTorch's own rounding moves the quantity that is
compared. Then both PyTorch models compute with the graph's choice, and the logits are held to the ordinary tolerance.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gqa_plugins.grouped_attention import long_selection

from ..bundle.manifest import Manifest
from ..compare.case_verdict import CaseVerdict, KindVerdict, Location
from ..compare.tolerance import EPSILON, FACTOR, FLOOR_ULPS, tolerance
from ..long_context.attention import NAME, Replacement, register, replaced
from ..progress import Progress
from .long_choices import Choices, agreement
from .long_graph import LongGraph
from .reference import Reference

ENTRY = "long prompts"
SELECTION = "selection"


@dataclass(frozen=True)
class LongCase:
    """One way of feeding long prompts.

    Attributes:
        name, purpose: as of `Case`.
        calls: new tokens per sequence, [[of each row], ...].
    """

    name: str
    purpose: str
    calls: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence, in the end."""
        return tuple(sum(call[row] for call in self.calls) for row in range(len(self.calls[0])))


def long_cases(manifest: Manifest, level: str) -> tuple[LongCase, ...]:
    """The cases of a level that the capacity has room for."""
    assert manifest.long is not None
    plan = manifest.long.plan
    leaf, few = plan.setting.leaf, plan.setting.exact_steps
    whole = 2 * leaf + leaf // 2 + few + 3
    cases = [
        LongCase("long_prompt", "a prompt of two leaves and a part", ((whole,),)),
        LongCase("long_ragged", "right-padded prompts of two leaves and a part, a leaf and a token, less than a leaf",
                 ((whole, leaf + 1, max(leaf - 1, few + 1)),)),
        LongCase("long_leaf", "a prompt of exactly one leaf, which is exact attention", ((max(leaf, few + 1),),))]
    if level == "full":
        cases += [
            LongCase("long_chunks", "a prompt in chunks that end at leaves, and one that does not",
                     ((leaf,), (leaf + leaf // 4,), (leaf // 2 + leaf // 4 + few,))),
            LongCase("long_many", "a prompt of several leaves, with a segment of two",
                     ((3 * leaf + leaf // 3 + few,),)),
            LongCase("long_steps", "steps of few tokens after a long prompt, which are exact",
                     ((leaf + few + 1,), (few,), (few + 1,)))]
    return tuple(case for case in cases if max(case.lengths) <= manifest.capacity)


def judge_long(folder: Path, manifest: Manifest, provider: str, known: Reference, dtype: str, level: str,
               report: Progress, threads: int = 0) -> Iterator[tuple[CaseVerdict, str]]:
    """Run every case; yields its verdict and a line on the agreement of selections."""
    register()
    graph = LongGraph(folder, manifest, provider, threads)
    cases = long_cases(manifest, level)
    for number, case in enumerate(cases):
        report(f"comparing: {case.name}", number, len(cases))
        yield _judge(graph, manifest, known, dtype, case)


def _judge(graph: LongGraph, manifest: Manifest, known: Reference, dtype: str,
           case: LongCase) -> tuple[CaseVerdict, str]:
    assert manifest.long is not None
    began, plan = time.perf_counter(), manifest.long.plan
    random = np.random.default_rng(17)
    rows = [random.integers(0, manifest.spec.vocabulary, length) for length in case.lengths]
    logits, handed = _run_graph(graph, manifest, case, rows)
    worst = scale = baseline = 0.0
    place, agreed, compared, moved, excess = (0, 0, 0), 0, 0, 0.0, 0.0
    wrong: str = ""
    for row, ids in enumerate(rows):
        chunks = tuple((sum(call[row] for call in case.calls[:at]), call[row]) for at, call in enumerate(case.calls))
        replacement = Replacement(manifest.spec, plan.setting, plan.seed, frozenset(plan.layers), handed=handed[row],
                                  chunks=chunks)
        expected, choices = _run_torch(known.session, replacement, ids)
        eager, other = (expected, None) if known.eager is None else _run_torch(known.eager, replacement, ids)
        wide = torch.from_numpy(logits[row]).double()
        if manifest.logits == "last":
            ends = [past + new - 1 for past, new in chunks]
            expected, eager = expected[ends], eager[ends]
        difference = (wide - expected.double()).abs().nan_to_num(nan=torch.inf)
        baseline = max(baseline, float((eager.double() - expected.double()).abs().max()))
        scale = max(scale, float(expected.abs().max()))
        if float(difference.max()) >= worst:
            worst = float(difference.max())
            spot = int(difference.argmax())
            place = (row, *divmod(spot, difference.shape[1]))
            shown = (float(expected.flatten()[spot]), float(wide.flatten()[spot]))
        found = agreement(choices, other, handed[row], plan.setting, FACTOR,
                          FLOOR_ULPS[dtype] * EPSILON[dtype])
        agreed, compared = agreed + found.agreed, compared + found.compared
        if found.excess > excess:
            excess, moved, wrong = found.excess, found.bound, found.where
    bound = tolerance(baseline if known.eager is not None else None, scale, dtype)
    good = worst <= bound.bound
    axes = dict(zip(("batch", "token", "id"), place))
    first = None if good else Location(case.name, 0, "prefill", "logits", axes, *shown, worst, bound.bound)
    output = KindVerdict("logits", "logits", worst, bound.bound, bound.baseline, bound.basis, first)
    missing = sorted(set(plan.layers) - graph.selecting)
    if missing:
        wrong, excess = f"layers {missing} give no selection", float("inf")
    choice = KindVerdict(SELECTION, SELECTION, excess, moved, 0.0, "baseline", None if not wrong else Location(
        case.name, 0, "prefill", f"{SELECTION}: {wrong}", {}, 0.0, excess, excess, moved))
    verdict = CaseVerdict(case.name, case.purpose, len(rows), case.lengths, 0, False, (output, choice), 0, 0, (), None,
                          baseline if known.eager is not None else None, time.perf_counter() - began, entry=ENTRY)
    if not compared:
        return verdict, f"case {case.name}: nothing was selected, every row was exact"
    return verdict, (f"case {case.name}: {agreed / compared:.4%} of the graph's selections are the fp64 reference's"
                     + (f"; {compared - agreed} differ, all near ties" if compared > agreed and not wrong else ""))


def _run_graph(graph: LongGraph, manifest: Manifest, case: LongCase,
               rows: list[np.ndarray]) -> tuple[list[np.ndarray], list[dict[int, list[long_selection.Selection]]]]:
    """Per row the logits of its tokens, and per layer what it selected in every call."""
    assert manifest.long is not None
    setting = long_selection.Setting(**manifest.long.plan.setting.attributes())
    spec = {layer.layer: layer for layer in manifest.spec.layers}
    logits: list[list[np.ndarray]] = [[] for _ in rows]
    handed: list[dict[int, list[long_selection.Selection]]] = [{} for _ in rows]
    graph.reset(len(rows))
    at = np.zeros(len(rows), np.int64)
    for call in case.calls:
        new = np.array(call, np.int64)
        ids = np.zeros((len(rows), int(new.max())), np.int64)
        for row, whole in enumerate(rows):
            ids[row, : new[row]] = whole[at[row]: at[row] + new[row]]
        step = graph.step(ids, new)
        for row in range(len(rows)):
            count, past = int(new[row]), int(at[row])
            logits[row].append(step.logits[row, :count] if manifest.logits == "all" else step.logits[row])
            for layer, found in step.selections.items():
                chosen = torch.from_numpy(found[row])
                if not chosen.shape[1]:
                    selection = long_selection.Selection()
                else:
                    group = spec[layer].num_heads // spec[layer].kv_num_heads
                    width = chosen.shape[1] - group * ids.shape[1] if setting.method == long_selection.HYPER else 0
                    selection = long_selection.unpacked(chosen, past, count, ids.shape[1], width, group, setting)
                    if selection.key_places is not None and selection.query_places is not None:
                        selection = long_selection.Selection(selection.key_places[:, : past + count],
                                                             selection.query_places[:, :, :count])
                handed[row].setdefault(layer, []).append(selection)
        at += new
    return [np.concatenate(parts) for parts in logits], handed


def _run_torch(session: Any, replacement: Replacement, ids: np.ndarray) -> tuple[torch.Tensor, Choices]:
    """Logits [S, V], and what each layer's choice was made from."""
    choices = Choices(replacement)
    with torch.inference_mode(), replaced(choices.watched()), session.attending(NAME) as model:
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
    return logits, choices
