"""Speculation, sampling, stop strings, log-probabilities, hooks, grammars, and chats of several turns."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from refusal import refused

import gqa_export as gqa
from gqa_export.bundle.manifest import read_manifest
from gqa_export.cli import main
from gqa_export.errors import NotCheckedHere
from gqa_export.runtime.completion import Extras, complete
from gqa_export.runtime.generate import LIMIT, STOPPED, generate
from gqa_export.runtime.ort.session import OrtSession
from gqa_export.runtime.sampling import Sampling, penalized, pick
from gqa_export.runtime.speculation import Draft, draft_room, ngram
from gqa_export.runtime.stop_strings import StopStrings
from gqa_export.runtime.text import BundleText

from .conftest import CAPACITY
from .test_generate import SIZE, Counting

PROMPT = [3, 4, 5, 9, 11, 3, 4, 5, 9, 11, 3, 4, 5]


def test_ngram_guesses_what_followed_the_latest_equal_tokens() -> None:
    assert ngram([1, 2, 3, 7, 1, 2, 3, 8, 9, 1, 2, 3], 2) == [8, 9]
    assert ngram([5, 6, 5], 4) == [6, 5]
    assert ngram([7, 7, 7, 7], 3) == [7]
    assert ngram([1, 2, 3], 4) == []
    assert ngram([4], 4) == []


def test_a_guess_leaves_room_in_the_cache_and_does_not_cross_longropes_switch() -> None:
    assert draft_room(10, 20, 0, 100) == 9
    assert draft_room(10, 20, 0, 4) == 3
    assert draft_room(10, 20, 14, 100) == 3
    assert draft_room(14, 20, 14, 100) == 5
    assert draft_room(19, 20, 0, 100) == 0


class Rewinding(Counting):
    """Answers for every token, and can go back."""

    def rewind_row(self, row: int, length: int) -> None:
        assert (row, 0 <= length <= self.lengths[0]) == (0, True)
        self.lengths[0] = length


@pytest.mark.parametrize("right", [0, 1, 3])
def test_a_guess_is_kept_up_to_its_first_wrong_token(right) -> None:
    def guess(history, most):
        good = [(history[-1] + 1 + i) % SIZE for i in range(most)]
        return [token if i < right else (token + 5) % SIZE for i, token in enumerate(good)]

    session = Rewinding()
    plain = generate(Counting(), [[1, 2, 3]], 12)
    result = generate(session, [[1, 2, 3]], 12, draft=Draft(guess, 4))
    assert result.tokens == plain.tokens
    assert result.finish == [LIMIT]
    assert session.lengths.tolist() == [3 + 12 - 1]
    assert result.accepted <= result.drafted
    assert (result.accepted == 0) == (right == 0)
    assert result.decode_steps == {0: 11, 1: 6, 3: 3}[right]


def test_end_tokens_and_stops_inside_a_guess_end_the_answer_there() -> None:
    def guess(history, most):
        return [(history[-1] + 1 + i) % SIZE for i in range(most)]

    session = Rewinding()
    assert generate(session, [[1]], 9, {4}, draft=Draft(guess, 5)).tokens == [[2, 3, 4]]
    assert session.lengths.tolist() == [3]
    seen = []
    result = generate(Rewinding(), [[1]], 9, on_token=lambda row, token: bool(seen.append(token)) or token != 5,
                      draft=Draft(guess, 5))
    assert (result.tokens, result.finish, seen) == ([[2, 3, 4, 5]], [STOPPED], [2, 3, 4, 5])


@pytest.mark.parametrize("cache", ["growing", "static"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, seed=3, top_p=0.9)], ids=["greedy", "sampled"])
def test_speculation_gives_the_tokens_of_decoding_one_by_one(bundle, cache, sampling) -> None:
    folder = bundle("ort", cache)
    width = read_manifest(folder).verify_width
    assert width == 7
    plain = generate(OrtSession.load(folder, "cpu"), [PROMPT], 30, sampling=sampling)
    session = OrtSession.load(folder, "cpu")
    guessed = generate(session, [PROMPT], 30, sampling=sampling, draft=Draft(ngram, width))
    assert guessed.tokens == plain.tokens
    assert session.lengths.tolist() == [len(PROMPT) + 29]
    assert guessed.drafted > 0
    known = [*PROMPT, *plain.tokens[0]]  # a guess that is always right
    best = generate(session, [PROMPT], 30, sampling=sampling,
                    draft=Draft(lambda history, most: known[len(history): len(history) + most], width))
    assert best.tokens == plain.tokens
    assert best.accepted == best.drafted
    assert best.decode_steps <= 6


def test_speculation_is_refused_where_a_guess_cannot_be_checked(bundle) -> None:
    last = bundle("ort", "growing", "last")
    assert read_manifest(last).verify_width == 1
    for folder, prompts in ((last, [PROMPT]), (bundle(), [PROMPT, PROMPT])):
        with refused("E-OPTION-SPECULATE"):
            generate(OrtSession.load(folder, "cpu"), prompts, 4, draft=Draft(ngram, read_manifest(folder).verify_width))
    session = OrtSession.load(bundle(), "cpu")
    object.__setattr__(session, "manifest", type("M", (), {"spec": type("S", (), {"states": (1,)})()})())
    with refused("E-OPTION-SPECULATE"):
        Draft(ngram, 7).check(session, 1)


def test_min_p_keeps_tokens_with_a_share_of_the_best_probability() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    reached = {pick(logits, Sampling(1.0, min_p=0.4), u) for u in np.linspace(0, 0.999, 50)}
    assert reached == {0, 1}
    assert {pick(logits, Sampling(1.0), u) for u in np.linspace(0, 0.999, 50)} == {0, 1, 2, 3}
    assert {pick(logits, Sampling(1.0, min_p=1.0), u) for u in np.linspace(0, 0.999, 50)} == {0}


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(0).standard_normal(12).astype(np.float32)
    for penalty in (0.5, 1.3, 4.0):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[1, 5, 5, 7]]), torch.from_numpy(logits)[None])
        assert np.allclose(penalized(logits, ([1, 5], [5, 7]), penalty), theirs[0].numpy())
    assert np.array_equal(penalized(logits, ([1], []), 1.0), logits)


@pytest.mark.parametrize("wrong", [{"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0},
                                   {"repetition_penalty": float("nan")}, {"min_p": float("nan")}])
def test_sampling_out_of_range_is_refused(wrong) -> None:
    with refused("E-OPTION-SAMPLING"):
        Sampling(**wrong)


def test_logprobs_are_those_of_the_model_before_the_hook(bundle) -> None:
    session = OrtSession.load(bundle(), "cpu")
    seen = []

    def forbid(row: int, logits: np.ndarray) -> None:
        assert row == 0
        seen.append(logits.copy())
        logits[int(logits.argmax())] = -np.inf

    result = generate(session, [PROMPT], 5, hook=forbid, logprobs=3)
    for token, raw, found in zip(result.tokens[0], seen, result.logprobs[0], strict=True):
        wide = raw.astype(np.float64)
        expected = wide - np.log(np.exp(wide).sum())
        assert token == int(np.argsort(-wide, kind="stable")[1])  # the hook took the best away
        assert found.token == token
        assert np.isclose(found.logprob, expected[token])
        assert found.top[1] == (token, found.logprob)
        assert len(found.top) == 3
    with refused("E-OPTION-LOGPROBS"):
        generate(session, [PROMPT], 5, logprobs=-1)


def test_a_hook_that_leaves_no_token_is_an_error_and_not_a_token(bundle) -> None:
    session = OrtSession.load(bundle(), "cpu")
    for value in (-np.inf, np.nan):
        with refused("E-RUN-HOOK"):
            generate(session, [PROMPT], 2, hook=lambda row, logits, value=value: logits.fill(value))


@pytest.mark.parametrize(("pieces", "stops", "shown", "found"), [
    (["ab", "c", "de"], ["cd"], ["ab", "", ""], True),
    (["ab", "c", "e"], ["cd"], ["ab", "", "ce"], False),
    (["a", "aa", "ab"], ["aab"], ["", "a", "a"], True),
    (["xaay"], ["y", "aa"], ["x"], True),
    (["abc"], [], ["abc"], False),
])
def test_what_could_begin_a_stop_string_is_held_back(pieces, stops, shown, found) -> None:
    watch = StopStrings(stops)
    assert [watch.push(piece) for piece in pieces] == shown
    assert watch.found is found


def test_held_back_text_comes_at_the_end_and_an_empty_stop_string_is_refused() -> None:
    watch = StopStrings(["stop"])
    assert (watch.push("a st"), watch.flush(), watch.flush()) == ("a ", "st", "")
    assert watch.cut("one stop two") == "one "
    with refused("E-OPTION-STOP"):
        StopStrings(["a", ""])


def test_an_answer_ends_before_its_stop_string(bundle) -> None:
    folder, pieces = bundle(), []
    text, ids = BundleText(folder), BundleText(folder).encode("The sea is")
    whole = complete(OrtSession.load(folder, "cpu"), ids, text, max_new_tokens=24)
    assert len(whole.text) > 8
    stop = whole.text[4:6]
    done = complete(OrtSession.load(folder, "cpu"), ids, text, max_new_tokens=24, on_text=pieces.append,
                    extras=Extras(stop=(stop,)))
    assert done.finish == "stop string"
    assert done.text == "".join(pieces) == whole.text[: whole.text.index(stop)]
    assert done.tokens == whole.tokens[: len(done.tokens)]
    with refused("E-OPTION-STOP"):
        complete(OrtSession.load(folder, "cpu"), [1, 2], None, max_new_tokens=2, extras=Extras(stop=("a",)))


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_a_chat_feeds_what_is_new_and_answers_as_one_that_is_fed_anew(bundle, cache) -> None:
    folder = bundle("ort", cache)
    chat, text = gqa.open_bundle(folder).conversation(system="s", provider="cpu"), BundleText(folder)
    messages = [{"role": "system", "content": "s"}]
    for turn, words in enumerate(("a", "b")):
        messages.append({"role": "user", "content": words})
        ids = text.encode_chat(messages)
        done = chat.say(words, max_new_tokens=3)
        alone = complete(OrtSession.load(folder, "cpu"), ids, text, max_new_tokens=3)
        assert done.tokens == alone.tokens
        assert done.prompt_tokens == ids
        assert (chat.fed == len(ids)) is (turn == 0)
        messages.append({"role": "assistant", "content": alone.text})
    assert chat.messages == messages


def test_a_message_that_does_not_fit_leaves_the_conversation_as_it_was(bundle) -> None:
    chat = gqa.open_bundle(bundle()).conversation(provider="cpu")
    chat.say("a", max_new_tokens=2)
    before = list(chat.messages)
    with refused("E-RUN-CAPACITY"):
        chat.say("x" * CAPACITY)
    assert chat.messages == before
    assert chat.say("b", max_new_tokens=2).tokens


def test_the_command_line_has_a_chat_of_several_turns_and_the_options_of_decoding(bundle) -> None:
    folder = str(bundle())
    done = CliRunner().invoke(main, ["run", folder, "--chat", "--max-new-tokens", "2"], input="a\n\nb\n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("fed ") == 2
    done = CliRunner().invoke(main, ["run", folder, "--token-ids", ",".join(map(str, PROMPT)), "--json", "--logprobs",
                                     "1", "--speculate", "ngram", "--min-p", "0.1", "--repetition-penalty", "1.1",
                                     "--max-new-tokens", "4"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [entry["token"] for entry in found["logprobs"]] == found["tokens"]
    assert CliRunner().invoke(main, ["run", folder, "--token-ids", "1", "--logprobs", "1"]).exit_code == 2
    assert CliRunner().invoke(main, ["run", folder, "--chat", "--json"]).exit_code == 2


SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def test_an_answer_by_a_json_schema_fits_it_whatever_the_model_would_say(bundle, tmp_path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (the extra `guidance`)")
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    opened = gqa.open_bundle(bundle())
    for temperature, seed in ((0.0, None), (1.5, 1)):
        done = opened.complete("The sea is", max_new_tokens=40, json_schema=path, temperature=temperature, seed=seed,
                               provider="cpu")
        assert set(json.loads(done.text)) == {"a"}
        assert done.finish in ("end token", "grammar complete")
    path.write_text("{")
    with refused("E-OPTION-JSON-SCHEMA"):
        opened.complete("The sea is", json_schema=path)
    path.write_text('{"type": "nothing of the kind"}')
    with refused("E-OPTION-JSON-SCHEMA"):
        opened.complete("The sea is", json_schema=path)


def test_without_llguidance_the_refusal_names_the_extra(bundle, tmp_path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with refused("E-ENV-LLGUIDANCE", NotCheckedHere) as refusal:
        gqa.open_bundle(bundle()).complete("The sea is", json_schema=tmp_path / "any.json")
    assert "guidance" in refusal.error.fix
