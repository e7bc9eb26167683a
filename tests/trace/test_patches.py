"""Are patches in place only while a model is traced, only on the code they were written for, and undone after?"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from gqa_models.shrink import small_config

from gqa_export.errors import GqaExportError
from gqa_export.trace import attention, masks, patches


def original(place: str):
    module, _, path = place.partition(":")
    found = importlib.import_module(f"transformers.models.{module}")
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    return found


FUNCTIONS = [patch.place for patch in patches.registry() if not patch.path.endswith("]")]


@pytest.mark.parametrize("place", FUNCTIONS)
def test_a_patched_function_is_the_one_the_patch_was_written_for(place):
    assert patches.digest(original(place)) == patches.SEEN[place], (
        "transformers changed this function: read it, adapt the patch, then run scripts/patch_digests.py")


def test_every_digest_belongs_to_a_patch():
    assert set(patches.SEEN) == set(FUNCTIONS)


def test_a_patch_is_in_place_inside_and_gone_after_even_if_the_trace_fails():
    from transformers.models.gptj import modeling_gptj

    before = modeling_gptj.GPTJAttention._attn

    def trace_that_fails():
        with patches.applied(small_config("gptj")) as inside:
            assert {patch.path for patch in inside} == {"GPTJAttention._attn", "GPTJ_ATTENTION_CLASSES[gqa_export]"}
            assert modeling_gptj.GPTJAttention._attn is not before
            with patches.applied(small_config("gptj")):
                pass
            assert modeling_gptj.GPTJAttention._attn is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace_that_fails()
    assert modeling_gptj.GPTJAttention._attn is before
    assert attention.NAME not in modeling_gptj.GPTJ_ATTENTION_CLASSES


def test_a_model_without_patches_gets_none():
    with patches.applied(small_config("llama")) as inside:
        assert inside == ()


def test_other_code_in_transformers_is_refused(monkeypatch):
    place = "falcon.modeling_falcon:FalconAttention.forward"
    monkeypatch.setitem(patches.SEEN, place, "0" * 12)
    with pytest.raises(GqaExportError, match=r"other code in FalconAttention\.forward"), patches.applied(
            small_config("falcon")):
        pass


def test_falcon_with_alibi_is_refused_by_name():
    from gqa_export.trace.probe import probe

    with pytest.raises(GqaExportError, match="ALiBi"):
        probe(small_config("falcon", alibi=True))


def test_a_window_beside_the_mask_narrows_it():
    tagged = torch.zeros(1, 1, 1, 1)
    tagged.gqa_mask = attention.MaskTag(lambda b, h, q, k: k <= q, False, None)
    narrow = attention.windowed(tagged, 7)
    assert masks.window_of(narrow.gqa_mask, 0, 64, 4) == 7
    assert attention.windowed(tagged, 0) is tagged
    assert attention.windowed(None, 7) is None


def test_positions_are_asked_for_only_where_they_are_given():
    with attention.recording(None), pytest.raises(GqaExportError, match="asks for positions"):
        attention.positions()
