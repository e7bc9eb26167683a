"""The search: probes of rising complexity, every layer fed PyTorch's inputs, the first op whose output is off."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.integrity import check_files
from ..bundle.manifest import Manifest, read_manifest
from ..errors import EXIT_DIFFERENT, EXIT_PASSED, GqaExportError, UnsupportedModel
from ..graph_io import LOGITS, past_names
from ..progress import silent
from ..runtime.feeds import step_feed
from ..validation.accuracy_level import at_level_zero
from .known_faults import attention_words, linear_words, rotation_words, rounding_words
from .marked_graph import Marked, force, keep_residual, mark, open_graph, present_of, run, show_all
from .match_tensors import Place, agreed, bound_of, columns, find, flat, relative
from .probes import Probe, probes
from .torch_layers import LayerReference, RowReference, layer_list, watch_row

EMBEDDING, END = "embedding", "final norm and head"


@dataclass(frozen=True)
class Finding:
    """The first op that is wrong. layer -1: before the layers; their number: after them. words: the pattern, "" if
    none was recognized. token: within the step (of the cache for keys and values)."""

    probe: str
    layer: int
    op: str
    max_abs: float
    bound: float
    row: int
    token: int
    feature: int
    expected: float
    got: float
    words: str = ""

    def __str__(self) -> str:
        where = f"layer {self.layer}, {self.op}" if self.op not in (EMBEDDING, END) else self.op
        return (f"{where}: off by {self.max_abs:.3g}, allowed {self.bound:.3g} (probe {self.probe}, row {self.row}, "
                f"token {self.token}, feature {self.feature}: got {self.got:.6g}, expected {self.expected:.6g})"
                + (f"\n  looks like: {self.words}" if self.words else ""))


@dataclass
class Bisection:
    """What was found, which probes ran, and the points that no layer shows (fused away)."""

    finding: Finding | None
    probes: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    """on the checkpoint"""

    @property
    def exit_code(self) -> int:
        """0 nothing is wrong in these probes, 1 something is."""
        return EXIT_DIFFERENT if self.finding else EXIT_PASSED


def bisect(bundle: Path, against: str | Path, ignore_unused: bool = False) -> Bisection:
    """Find the first layer and operator of a bundle whose output is out of tolerance.

    Args:
        bundle: folder of a bundle with a graph.
        against: the checkpoint it was made from.
        ignore_unused: note tensors that its model does not use, instead of refusing them.

    Returns:
        What was found, or that these probes found nothing.

    Raises:
        InvalidBundle: the bundle is damaged.
        InvalidCheckpoint: the checkpoint has tensors that its model does not use.
        UnsupportedModel: its layers keep states of fixed size, or rings, or codes in place of numbers.
        GqaExportError: it holds an engine, or the names of its nodes do not tell the layers.
        NotCheckedHere: PyTorch does not fit in memory.
    """
    from ..bundle.attention_claims import check_claims
    from ..bundle.source_checkpoint import open_for
    from ..checkpoint.decided import decided_by_weights
    from ..checkpoint.unused_tensors import unused_notes
    from ..validation.reference import runnable
    from ..validation.sessions import pytorch_sessions, torch_threads

    manifest = read_manifest(bundle)
    if manifest.engine is not None:
        raise GqaExportError("bisect needs a graph, and an engine does not show its nodes", str(bundle),
                             "bisect the ONNX bundle that it was built from", code="E-VALIDATE-BISECT-ENGINE")
    if manifest.spec.states:
        raise UnsupportedModel("bisect does not know the states of fixed size that layers of this model keep",
                               str(bundle), "validate it: the verdict names the first layer whose state differs",
                               code="E-VALIDATE-BISECT-STATES")
    if manifest.kv_cache is not None:
        raise UnsupportedModel("bisect feeds PyTorch's numbers, which a cache of codes does not take", str(bundle),
                               "export without --kv-cache and bisect that", code="E-VALIDATE-BISECT-CODES")
    if manifest.window_cache is not None:
        raise UnsupportedModel("bisect feeds whole prompts, which caches that are rings do not take", str(bundle),
                               "export with --window-cache full and bisect that", code="E-VALIDATE-BISECT-RINGS")
    check_files(bundle, manifest)
    check_claims(bundle, manifest)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(manifest))
        ran, where, target = runnable(stack, bundle, manifest, "float32", [], silent)
        ran, where, _ = stack.enter_context(at_level_zero(where, ran))
        checkpoint = open_for(manifest, against)
        decided_by_weights(checkpoint)
        notes = unused_notes(checkpoint, (), ignore_unused)
        reference, _, _ = pytorch_sessions(checkpoint, manifest, "float32", [])
        prefix, layers = layer_list(reference.model, len(manifest.spec.layers))
        search = _Search(ran, where, target.interface, reference, layers, prefix)
        done: list[str] = []
        for probe in probes(manifest):
            done.append(probe.name)
            if (finding := search.look(probe)) is not None:
                return Bisection(finding, done, search.hidden, notes)
        return Bisection(None, done, search.hidden, notes)


class _Search:
    """A bundle's graph and the reference beside it. The graph is cut once, at the first probe."""

    def __init__(self, manifest: Manifest, folder: Path, interface: str, reference: Any, layers: Any,
                 prefix: str) -> None:
        self.manifest, self.folder, self.interface = manifest, folder, interface
        self.reference, self.layers, self.prefix = reference, layers, prefix
        self.marked: Marked | None = None
        self.session: Any = None
        self.hidden: list[str] = []

    def look(self, probe: Probe) -> Finding | None:
        """The first wrong op in one probe."""
        rows = [watch_row(self.reference, self.layers, past, new) for past, new in probe.rows]
        tokens = [len(new) for _, new in probe.rows]
        feed = self._feed(probe, rows)
        size = (len(rows), max(tokens), rows[0].layers[0].hidden.shape[1])
        if self.marked is None:
            self.marked = mark(self.folder, self.prefix, len(self.layers))
            shown = run(open_graph(show_all(self.marked), self.folder), feed)
            shapes = {name: value.shape for name, value in shown.items()}
            keep_residual(self.marked, shapes, size)
            self.session = open_graph(force(self.marked), self.folder)
        for name, place in self.marked.forced.items():
            feed[name] = np.zeros(size, np.float32)
            if name.endswith(".0"):
                for b, row in enumerate(rows):
                    hidden = row.layers[place].hidden if place < len(self.layers) else row.layers[-1].output
                    feed[name][b, : tokens[b]] = hidden
        found = run(self.session, feed)
        return self._judge(probe, rows, tokens, found)

    def _feed(self, probe: Probe, rows: list[RowReference]) -> dict[str, np.ndarray]:
        lengths = np.array([len(past) for past, _ in probe.rows])
        new = np.array([len(ids) for _, ids in probe.rows])
        ids = np.zeros((len(rows), new.max()), np.int64)
        for b, (_, row) in enumerate(probe.rows):
            ids[b, : len(row)] = row
        room = self.manifest.capacity if self.manifest.cache == "static" else int(lengths.max())
        feed = step_feed(self.interface, ids, lengths, new, int(lengths.max()))
        for number, layer in enumerate(self.manifest.spec.owners):
            for kind, name in enumerate(past_names(layer.layer)):
                width = (layer.head_size, layer.value_head_size)[kind]
                past = np.zeros((len(rows), layer.kv_num_heads, room, width), np.float32)
                for b, seen in enumerate(rows):
                    past[b, :, : lengths[b]] = seen.cache[number][kind][:, : lengths[b]]
                feed[name] = past
        return feed

    def _judge(self, probe: Probe, rows: list[RowReference], tokens: list[int],
               found: dict[str, np.ndarray]) -> Finding | None:
        assert self.marked is not None
        first = self._sum(found, 0)
        if first is not None and (wrong := _worst(probe, -1, EMBEDDING, [row.layers[0].hidden for row in rows],
                                                  [first[b, :n] for b, n in enumerate(tokens)])):
            return wrong
        places = self._places(rows[0], tokens[0], found)
        for number in range(len(self.layers)):
            if wrong := self._layer(probe, number, rows, tokens, found, places):
                return wrong
        logits = found[LOGITS]
        last = logits.shape[1] != max(tokens)
        return _worst(probe, len(self.layers), END, [row.logits[-1:] if last else row.logits for row in rows],
                      [logits[b, :1 if last else n] for b, n in enumerate(tokens)])

    def _places(self, row: RowReference, tokens: int, found: dict[str, np.ndarray]) -> dict[str, Place]:
        """Where each point is, agreed among the layers."""
        per_layer: dict[str, list[list[Place]]] = {}
        for number, layer in enumerate(row.layers):
            mine = self._tensors(number, 0, found)
            for name, values in layer.points.items():
                expected = flat(values, tokens)
                if expected is not None and not name.endswith((".key", ".value")):
                    per_layer.setdefault(name, []).append(find(expected, mine))
        chosen = {name: agreed(places) for name, places in per_layer.items()}
        self.hidden = [name for name, place in chosen.items() if place is None and not name.endswith(".attention")]
        return {name: place for name, place in chosen.items() if place is not None}

    def _tensors(self, number: int, b: int, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A layer's tensors of one row, by their relative names."""
        assert self.marked is not None
        return {relative(name, self.prefix, number): found[name][b] for name in self.marked.owned[number]
                if name in found and found[name].ndim >= 3 and found[name].shape[0] > b
                and found[name].dtype.kind == "f"}

    def _layer(self, probe: Probe, number: int, rows: list[RowReference], tokens: list[int],
               found: dict[str, np.ndarray], places: dict[str, Place]) -> Finding | None:
        assert self.marked is not None
        for name in rows[0].layers[number].points:
            if name.endswith((".key", ".value")):
                expected, got = self._cached(number, name, rows, found)
            else:
                place = places.get(name)
                if place is None and name.endswith(".attention") and number in self.marked.attention:
                    place = Place(relative(self.marked.attention[number], self.prefix, number), 0)
                if place is None:
                    continue
                expected, got = [], []
                for b, row in enumerate(rows):
                    mine = self._tensors(number, b, found)
                    if place.name in mine:
                        mine[place.name] = _cut(mine[place.name], max(tokens), tokens[b])
                    one = flat(row.layers[number].points[name], tokens[b])
                    two = columns(mine, place, tokens[b], one.shape[1]) if one is not None else None
                    if one is not None and two is not None and one.shape == two.shape:
                        expected.append(one)
                        got.append(two)
            wrong = _worst(probe, number, name, expected, got)
            if wrong:
                words = self._words(number, name, rows[wrong.row].layers[number], expected[wrong.row], got[wrong.row])
                return Finding(**{**wrong.__dict__, "words": words})
        carried = self._sum(found, number + 1)
        if carried is None:
            return None
        return _worst(probe, number, "output", [row.layers[number].output for row in rows],
                      [carried[b, :n] for b, n in enumerate(tokens)])

    def _cached(self, number: int, name: str, rows: list[RowReference],
                found: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        kind = int(name.endswith(".value"))
        tensor = found[present_of(self.manifest.spec.layers[number].layer)[kind]]
        expected = [row.cache[number][kind] for row in rows]
        got = [tensor[b, :, : one.shape[1]].astype(np.float64) for b, one in enumerate(expected)]
        return [_by_token(one) for one in expected], [_by_token(one) for one in got]

    def _sum(self, found: dict[str, np.ndarray], place: int) -> np.ndarray | None:
        assert self.marked is not None
        names = self.marked.carried[place]
        return np.sum([found[name].astype(np.float64) for name in names], axis=0) if names else None

    def _words(self, number: int, name: str, reference: LayerReference, expected: np.ndarray, got: np.ndarray) -> str:
        layer = self.manifest.spec.layers[number]
        if name.endswith(".attention") and reference.attended is not None:
            return attention_words(reference.attended, expected, got)
        if name.endswith((".key", ".value")):
            heads = layer.kv_num_heads
            apart = [x.reshape(len(x), heads, -1).swapaxes(0, 1) for x in (expected, got)]
            return rotation_words(apart[0], apart[1], self._straight(name, reference, apart[0].shape))
        if name in reference.weights:
            return linear_words(reference.inputs[name], *reference.weights[name], expected, got, layer.head_size)
        return rounding_words(expected, got)

    def _straight(self, name: str, reference: LayerReference, shape: tuple[int, ...]) -> np.ndarray | None:
        """Keys before rotation [K, T, D], if the whole cache was written in this step and a projection shows them."""
        heads, tokens, size = shape
        for part in ("k_norm", "k_proj"):
            values = reference.points.get(f"{name.rpartition('.')[0]}.{part}")
            rows = flat(values, tokens) if values is not None else None
            if rows is not None and rows.shape[1] == heads * size and name.endswith(".key"):
                return rows.reshape(tokens, heads, size).swapaxes(0, 1)
        return None


def _cut(values: np.ndarray, padded: int, tokens: int) -> np.ndarray:
    """A row's tensor without its padding."""
    if values.shape[0] == padded:
        return values[:tokens]
    return values[:, :tokens] if values.ndim == 3 and values.shape[1] == padded else values


def _by_token(cache_KTD: np.ndarray) -> np.ndarray:
    return cache_KTD.swapaxes(0, 1).reshape(cache_KTD.shape[1], -1)


def _worst(probe: Probe, layer: int, op: str, expected: list[np.ndarray], got: list[np.ndarray]) -> Finding | None:
    """The largest error of a point over the rows, if it is more than rounding explains."""
    for b, (one, two) in enumerate(zip(expected, got)):
        bound = bound_of(one)
        gap = np.where(np.isfinite(two), np.abs(two - one), np.inf)
        if gap.size and not gap.max() <= bound:
            token, feature = (int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
            return Finding(probe.name, layer, op, float(gap.max()), bound, b, token, feature,
                           float(one[token, feature]), float(two[token, feature]))
    return None
