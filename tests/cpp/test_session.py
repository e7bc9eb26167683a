"""The decode loop over a toy engine and a stand-in for CUDA: what is fed, bound, captured, and refused before a run.

The toy's answer is a function of every token it has read (`toy_bundle.answer`), so that a lost, repeated or misplaced
token, a cache that is not zeroed or not shared between profiles, and a graph that replays old inputs all show.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Programs
from .toy_bundle import BATCH, CAPACITY, HEAD, LAYERS, answer, continued, engine_facts, manifest


class Played:
    """What a session said to a script, line by line, and what the stand-in for CUDA logged."""

    def __init__(self, programs: Programs, folder: Path, *lines: str, dtype: str = "float16", plugin: bool = True,
                 graph: bool = True, expect: int = 0, batch: int = BATCH, rope_switch: int = 0, hidden: bool = False,
                 ring: bool = False, codes: str = "", **environment: str) -> None:
        path, log = folder / "gqa_export.json", folder / "log"
        path.write_text(manifest(engine_facts(plugin, batch), dtype, rope_switch=rope_switch, hidden=hidden,
                                 ring=ring, codes=codes).to_json())
        log.write_text("")
        output = programs.run("session_on_toy", path, *([] if graph else ["no-graph"]), stdin="\n".join(lines) + "\n",
                              expect=expect, GQA_STUB_LOG=log, **environment)
        self.said = output.splitlines()
        self.log = log.read_text().splitlines()
        self.runs = [line for line in self.log if line.startswith("run")]

    def count(self, text: str) -> int:
        return self.log.count(text)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no-graph"])
def test_prefill_and_steps_read_every_token_once(programs: Programs, tmp_path: Path, dtype: str, graph: bool) -> None:
    played = Played(programs, tmp_path, "prefill 3,1,4", "step 1", "step 5", "step 9", "lengths", dtype=dtype,
                    graph=graph)
    tokens = [3, 1, 4, 1, 5, 9]
    assert played.said == [*(str(answer(tokens[:length])) for length in (3, 4, 5, 6)), "6"]
    assert played.runs == ["run profile 1 batch 1 steps 3", *["run profile 0 batch 1 steps 1"] * 3]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_engine_that_also_gives_hidden_states_runs_with_memory_for_them(programs: Programs, tmp_path: Path,
                                                                          dtype: str) -> None:
    """TensorRT refuses to run while an output has no address, and a prompt fills all of it."""
    prompt = [3, 1, 4, 1, 5]
    played = Played(programs, tmp_path, "prefill 3,1,4,1,5;2;7,7", "step 9,8,6", dtype=dtype, hidden=True)
    assert played.said == [f"{answer(prompt)} {answer([2])} {answer([7, 7])}",
                           f"{answer([*prompt, 9])} {answer([2, 8])} {answer([7, 7, 6])}"]


def test_decode_is_captured_once_after_a_first_plain_run_and_then_replayed(programs: Programs, tmp_path: Path) -> None:
    played = Played(programs, tmp_path, "prefill 3,1,4", "step 1", "step 5", "step 9", "step 2")
    order = [line for line in played.log if line.startswith(("run", "capture", "graph"))]
    run = "run profile 0 batch 1 steps 1"
    assert order == ["run profile 1 batch 1 steps 3", run, "capture begins", "capture ends",
                     *["graph launched", run] * 3, "graph destroyed"]


def test_graph_is_made_again_for_another_batch(programs: Programs, tmp_path: Path) -> None:
    played = Played(programs, tmp_path, "prefill 1,2", "step 3", "step 4", "prefill 5;6,7", "step 8,9", "step 1,1",
                    "lengths")
    assert played.said == [str(answer([1, 2])), str(answer([1, 2, 3])), str(answer([1, 2, 3, 4])),
                           f"{answer([5])} {answer([6, 7])}", f"{answer([5, 8])} {answer([6, 7, 9])}",
                           f"{answer([5, 8, 1])} {answer([6, 7, 9, 1])}", "3 4"]
    assert played.count("capture begins") == 2
    assert played.count("graph destroyed") == 2


def test_ragged_batch_equals_each_row_alone(programs: Programs, tmp_path: Path) -> None:
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]
    text = ";".join(",".join(map(str, prompt)) for prompt in prompts)
    together = Played(programs, tmp_path, f"generate 6 - {text}")
    expected = [continued(prompt, 6) for prompt in prompts]
    assert together.said == [";".join(",".join(map(str, row)) for row in expected)]
    for prompt, row in zip(prompts, expected, strict=True):
        alone = Played(programs, tmp_path, f"generate 6 - {','.join(map(str, prompt))}")
        assert alone.said == [",".join(map(str, row))]


def test_prompt_longer_than_the_profile_is_read_in_parts(programs: Programs, tmp_path: Path) -> None:
    """max_prompt is 4: 9 tokens are 4 + 4 + 1, and the row that ends in the first part keeps its logits."""
    played = Played(programs, tmp_path, "prefill 1,2,3,4,5,6,7,8,9;4,2", "lengths")
    assert played.said == [f"{answer(range(1, 10))} {answer([4, 2])}", "9 2"]
    assert played.runs == [*["run profile 1 batch 2 steps 4"] * 2, "run profile 0 batch 2 steps 1"]


def test_extend_and_resting_rows(programs: Programs, tmp_path: Path) -> None:
    played = Played(programs, tmp_path, "prefill 1,2;3", "extend 4,5;", "step -1,6", "lengths")
    assert played.said == [f"{answer([1, 2])} {answer([3])}", f"{answer([1, 2, 4, 5])} 0", f"0 {answer([3, 6])}",
                           "4 2"]


def test_row_stops_at_any_of_several_end_tokens_and_the_others_go_on(programs: Programs, tmp_path: Path) -> None:
    prompts, ends = [[3, 1, 4], [15, 9, 2, 6], [5]], (2, 16)
    text = ";".join(",".join(map(str, prompt)) for prompt in prompts)
    played = Played(programs, tmp_path, f"generate 10 {','.join(map(str, ends))} {text}", "lengths")
    rows = [continued(prompt, 10, ends) for prompt in prompts]
    assert played.said[0] == ";".join(",".join(map(str, row)) for row in rows)
    assert [len(row) for row in rows] == [4, 1, 2]
    # The last token of a row is never read back.
    assert played.said[1] == " ".join(str(len(p) + len(row) - 1) for p, row in zip(prompts, rows, strict=True))


def test_end_tokens_of_the_manifest_are_used_where_none_are_given(programs: Programs, tmp_path: Path) -> None:
    prompt = next([first] for first in range(50) if continued([first], 9)[-1] in (2, 7) and first > 1)
    played = Played(programs, tmp_path, f"generate 9 - {prompt[0]}")
    assert played.said == [",".join(map(str, continued(prompt, 9)))]


@pytest.mark.parametrize(("line", "what"), [
    ("prefill 1;2;3;4", "the batch has 4 rows, the engine takes 1 to 3"),
    ("prefill " + ",".join(["1"] * 17), "row 0 holds 0 tokens and would get 17: more than the cache's capacity of 16"),
    ("prefill 1;", "row 1 has no tokens"),
    ("prefill 1,50", "row 0 has token 50, outside the vocabulary of 50"),
    ("prefill 1,-4", "row 0 has token -4, outside the vocabulary of 50"),
    ("step 1,2", "2 rows of tokens for a batch of 1"),
    ("extend " + ",".join(["1"] * 14), "row 0 holds 3 tokens and would get 14: more than the cache's capacity of 16"),
    ("generate 15 - 1,2,3", "row 0 holds 0 tokens and would get 17: more than the cache's capacity of 16"),
    ("generate 0 - 1", "max_new_tokens is 0"),
])
def test_what_does_not_fit_is_refused_before_a_run_and_changes_nothing(programs: Programs, tmp_path: Path, line: str,
                                                                       what: str) -> None:
    played = Played(programs, tmp_path, "prefill 3,1,4", line, "lengths", "step 1")
    kind, said, where, fix = played.said[1].split("|")
    assert (kind, said) == ("error", what)
    assert where
    assert fix
    assert played.said[2:] == ["3", str(answer([3, 1, 4, 1]))]
    assert len(played.runs) == 2


def test_cache_is_filled_to_its_last_place_and_no_further(programs: Programs, tmp_path: Path) -> None:
    tokens = [number % 7 for number in range(CAPACITY)]
    played = Played(programs, tmp_path, f"prefill {','.join(map(str, tokens))}", "step 1", "lengths")
    assert played.said[0] == str(answer(tokens))
    assert played.said[1].startswith("error|row 0 holds 16 tokens and would get 1")
    assert played.said[2] == "16"


def test_cache_is_allocated_once_zeroed_and_given_back(programs: Programs, tmp_path: Path) -> None:
    """Fresh memory of the stand-in is NaN: an answer at all means that it was zeroed. What is allocated is freed."""
    played = Played(programs, tmp_path, "prefill 3,1,4", "step 1", "step 5", "step 9")
    assert played.said[0] == str(answer([3, 1, 4]))
    cache = 3 * CAPACITY * HEAD * 2
    assert played.count(f"allocated {cache}") == 2 * LAYERS
    assert sum(line.startswith("allocated") for line in played.log) == played.count("freed") == 2 * LAYERS + 4
    assert played.log[-1] == "context released"


@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn"])
def test_a_cache_of_codes_has_a_byte_a_number_and_its_rows_are_copied_as_they_are(programs: Programs, tmp_path: Path,
                                                                                 codes: str) -> None:
    """The toy writes its tokens as bytes of either type. Row 0 is copied to row 2, and goes back."""
    played = Played(programs, tmp_path, "prefill 3,1,4;2;7,7", "step 1,8,6", "copy 0 2 3", "rewind 0 2", "step 5,8,9",
                    codes=codes)
    assert played.count(f"allocated {3 * CAPACITY * HEAD}") == 2 * LAYERS
    assert played.said[0] == f"{answer([3, 1, 4])} {answer([2])} {answer([7, 7])}"
    assert played.said[-1] == f"{answer([3, 1, 5])} {answer([2, 8, 8])} {answer([3, 1, 4, 9])}"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_logits_that_are_not_numbers_are_an_error_and_the_token_is_not_kept(programs: Programs, tmp_path: Path,
                                                                            dtype: str) -> None:
    played = Played(programs, tmp_path, "prefill 3,1", "step 49", "lengths", "step 4", dtype=dtype)
    assert played.said[1].startswith("error|row 0's logits are not numbers|the engine's output|the number format")
    assert [*played.said[:1], *played.said[2:]] == [str(answer([3, 1])), "2", str(answer([3, 1, 4]))]


def test_capture_that_fails_is_said_and_decoding_goes_on(programs: Programs, tmp_path: Path) -> None:
    for symbol in ("cuStreamBeginCapture_v2", "cuGraphInstantiateWithFlags"):
        played = Played(programs, tmp_path, "prefill 3", "step 1", "step 4", "step 1", GQA_STUB_FAIL=symbol)
        assert played.said == [str(answer(tokens)) for tokens in ([3], [3, 1], [3, 1, 4], [3, 1, 4, 1])]
        notes = [line for line in played.log if line.startswith("note")]
        assert len(notes) == 1
        assert notes[0].startswith("note decode steps run without a CUDA graph: ")


def test_machine_without_a_gpu_or_without_memory_is_an_error_with_its_fix(programs: Programs, tmp_path: Path) -> None:
    gone = Played(programs, tmp_path, expect=2, GQA_STUB_NO_GPU="1").said[0].split("|")
    assert gone[1] == "the CUDA driver does not start (error 100)"
    assert "nvidia-smi" in gone[3]
    full = Played(programs, tmp_path, expect=2, GQA_STUB_FAIL="cuMemAlloc_v2").said[0].split("|")
    assert full[1].startswith("allocating 48 bytes on the GPU failed: CUDA_ERROR_OUT_OF_MEMORY")
    assert full[3] == "free GPU memory, or use a smaller batch or capacity"
