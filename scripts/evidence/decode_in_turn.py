"""Greedy decoders side by side: bundles of ours and of onnxruntime-genai, one step of each in turn, in fresh processes.

Where a session's weights come to lie in memory moves its speed by more than what is measured, either way, and in a
process that has opened other sessions the same way each time. So there are rounds, each in a process of its own, in
which the decoders are opened in one order and the other in turn. One thread each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gqa_export.runtime.generate import PREFILL_PIECE
from gqa_export.runtime.open_session import open_bundle

PEER = "onnxruntime-genai builder"
"""names that begin with this are bundles of the peer's"""
STEPS = 48
"""timed at each length, the first few left out"""
WARM = 4
Pair = tuple[float, float]
"""milliseconds of a step: on the clock, and of the process on a core"""


def for_one_thread(folder: Path) -> Path:
    """A bundle of the peer's, set to one thread, and to go on whatever token comes."""
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"].update(intra_op_num_threads=1)
    config["model"]["eos_token_id"] = []
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


class Ours:
    """A bundle of ours in our session, greedy."""

    def __init__(self, bundle: Path) -> None:
        self._session = open_bundle(bundle, "cpu", threads=1)
        self._session.reset(1)
        self.tokens: list[int] = []

    def feed(self, ids: list[int]) -> None:
        """A prompt, or more of it; nothing of it is timed."""
        for start in range(0, len(ids), PREFILL_PIECE):
            logits = self._session.step(np.array([ids[start : start + PREFILL_PIECE]], np.int64)).logits
        self._next = int(logits[0, -1].argmax())

    def step(self) -> None:
        """One token."""
        self.tokens.append(self._next)
        self._next = int(self._session.step(np.array([[self._next]], np.int64)).logits[0, -1].argmax())


class Peer:
    """A bundle of the peer's in its own runtime, greedy. room: tokens that its cache holds."""

    def __init__(self, folder: Path, room: int) -> None:
        import onnxruntime_genai as genai

        model = genai.Model(str(folder))
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=room, do_sample=False)
        self._generator = genai.Generator(model, params)
        self.tokens: list[int] = []

    def feed(self, ids: list[int]) -> None:
        """As of Ours."""
        for start in range(0, len(ids), PREFILL_PIECE):
            self._generator.append_tokens(np.array([ids[start : start + PREFILL_PIECE]], np.int32))

    def step(self) -> None:
        """As of Ours: a token is chosen and its logits are computed."""
        self._generator.generate_next_token()
        self.tokens.append(int(self._generator.get_next_tokens()[0]))


def timed(step: Callable[[], None]) -> Pair:
    """Milliseconds of one step: on the clock, and of this process on a core."""
    began, worked = time.perf_counter(), time.process_time()
    step()
    return 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - worked)


def one_round(bundles: Mapping[str, str], vocabulary: int, lengths: Sequence[int], room: int,
              seed: int) -> dict[str, Any]:
    """Open every bundle in this process, and time steps of each in turn. bundles: by name, see PEER.

    Returns:
        By length and name what each step took, and whether all runners wrote the same tokens.
    """
    runners: dict[str, Any] = {
        name: Peer(Path(bundles[name]), room) if name.startswith(PEER) else Ours(Path(bundles[name]))
        for name in sorted(bundles, reverse=bool(seed % 2))}
    random, past = np.random.default_rng(seed), 0
    found: dict[str, dict[str, list[Pair]]] = {}
    for length in lengths:
        more = random.integers(4, vocabulary, length - past).tolist()
        for runner in runners.values():
            runner.feed(more)
        steps: dict[str, list[Pair]] = {name: [] for name in bundles}
        for step in range(WARM + STEPS):
            for name in sorted(runners, reverse=bool(step % 2)):
                steps[name].append(timed(runners[name].step))
        past = length + WARM + STEPS
        found[str(length)] = {name: pairs[WARM:] for name, pairs in steps.items()}
    return {"steps": found, "same": len({tuple(runner.tokens) for runner in runners.values()}) == 1}


def rounds(bundles: Mapping[str, Path], vocabulary: int, lengths: Sequence[Sequence[int]], room: int,
           tell: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """`one_round` in processes of their own. lengths: of each round."""
    done = []
    for number, few in enumerate(lengths):
        told = json.dumps([{name: str(place) for name, place in bundles.items()}, vocabulary, few, room, number])
        ran = subprocess.run([sys.executable, __file__, told], check=True, stdout=subprocess.PIPE, text=True)
        done.append(json.loads(ran.stdout.splitlines()[-1]))
        tell(f"round {number + 1} of {len(lengths)}")
    return done


def speeds(steps: Sequence[Mapping[str, Sequence[Pair]]], ours: str, theirs: str, place: int = 1) -> list[float]:
    """Our speed as a share of theirs, of each round: the median over pairs of steps. steps: of one length, by name.
    place: 0 is the clock, 1 the core."""
    return [round(statistics.median(b[place] / a[place] for a, b in zip(one[ours], one[theirs])), 3) for one in steps]


if __name__ == "__main__":
    print(json.dumps(one_round(*json.loads(sys.argv[1]))))
