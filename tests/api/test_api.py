"""The public API as a program uses it: `import gqa_export as gqa`."""

from __future__ import annotations

import inspect
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from gqa_models import write_tiny

import gqa_export as gqa
from gqa_export import api
from gqa_export.bundle.manifest import DATA, MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama as a saved checkpoint."""
    return write_tiny("llama", tmp_path_factory.mktemp("api") / "tiny-llama")


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory) -> gqa.Bundle:
    """It, exported from its folder."""
    return gqa.export(folder, tmp_path_factory.mktemp("api") / "bundle")


def load(folder: Path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = ("import sys, gqa_export as gqa\nassert 'Bundle' in dir(gqa)\n"
            "print(sorted({'torch', 'numpy', 'onnx', 'transformers', 'click', 'pydantic'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_promised_is_there_and_a_misspelt_name_is_an_attribute_error() -> None:
    assert {name for name in gqa.__all__ if getattr(gqa, name) is None} == set()
    assert set(api.__all__) <= set(gqa.__all__)
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        _ = gqa.exprot  # type: ignore[attr-defined]


def test_options_are_keyword_only_and_no_signature_says_any() -> None:
    functions = [getattr(api, name) for name in api.__all__ if inspect.isfunction(getattr(api, name))]
    functions += [member for kind in (api.Bundle, api.Session)
                  for name, member in vars(kind).items() if inspect.isfunction(member) and not name.startswith("_")]
    assert len(functions) > 15
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        words = [str(each.annotation) for each in parameters] + [str(inspect.signature(function).return_annotation)]
        assert not [word for word in words if "Any" in word], function
        given = {each.name for each in parameters
                 if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is not each.empty}
        assert given <= {"output", "prompt", "lengths", "batch", "length"}, function


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_in_memory_is_exported_as_from_its_folder_to_the_byte(name, tmp_path) -> None:
    saved = write_tiny(name, tmp_path / name)
    model = load(saved)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    from_folder = gqa.export(saved, tmp_path / "a")
    from_memory = gqa.export(model, tmp_path / "b")
    for file in (MODEL, DATA):
        assert (from_memory.folder / file).read_bytes() == (from_folder.folder / file).read_bytes(), file
    assert from_memory.manifest.spec == from_folder.manifest.spec
    assert from_memory.manifest.tokens == from_folder.manifest.tokens
    assert from_memory.manifest.source["kind"] == "memory"
    verdict = from_memory.validate(against=model, steps=2)
    assert verdict.passed
    assert verdict.max_abs_logits == from_folder.validate(saved, steps=2).max_abs_logits
    assert all(bool((model.state_dict()[key] == tensor).all()) for key, tensor in before.items())


def test_a_model_in_bf16_and_in_training_mode_is_exported_in_another_format(folder, tmp_path) -> None:
    import torch

    model = load(folder).to(torch.bfloat16).train()
    bundle = gqa.export(model, tmp_path / "out", dtype="fp32")
    assert model.training
    assert model.dtype == torch.bfloat16
    assert bundle.manifest.source["dtype"] == "bfloat16"
    assert bundle.validate(against=model, steps=2).passed


def test_weights_changed_in_memory_are_the_ones_exported_and_validation_sees_it(folder, tmp_path) -> None:
    import torch

    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    changed = gqa.export(model, tmp_path / "out")
    assert changed.validate(against=model, steps=2).passed
    assert not changed.validate(against=folder, steps=2).passed


def test_what_the_configuration_does_not_describe_is_refused_by_name(folder, tmp_path) -> None:
    import torch

    def expect(code: str, model) -> None:
        with pytest.raises(gqa.UnsupportedModel) as refusal:
            gqa.export(model, tmp_path / "out")
        assert refusal.value.code == code
        assert refusal.value.fix
        assert not (tmp_path / "out").exists()

    patched = load(folder)
    patched.model.layers[1].mlp.forward = lambda x: x
    expect("E-MODEL-PATCHED", patched)
    wider = load(folder)
    wider.model.layers[0].mlp.down_proj = torch.nn.Linear(
        wider.config.intermediate_size, wider.config.hidden_size, bias=True)
    expect("E-MODEL-STRUCTURE", wider)
    expect("E-MODEL-META", load(folder).to("meta"))
    expect("E-MODEL-KIND", torch.nn.Linear(2, 2))


def test_a_tokenizer_beside_a_folder_and_links_to_memory_are_refused(folder, tmp_path) -> None:
    with pytest.raises(gqa.GqaExportError) as refusal:
        gqa.export(folder, tmp_path / "out", tokenizer=object())  # type: ignore[arg-type]
    assert refusal.value.code == "E-OPTION-TOKENIZER"
    with pytest.raises(gqa.GqaExportError) as refusal:
        gqa.export(load(folder), tmp_path / "out", weights="link")
    assert refusal.value.code == "E-OPTION-WEIGHTS"


def test_two_exports_one_after_the_other_and_calls_of_every_kind_in_one_process(folder, tmp_path) -> None:
    first = gqa.export(folder, tmp_path / "one")
    second = gqa.export(folder, tmp_path / "two", target="portable", cache="static", capacity=64)
    third = gqa.export(folder, tmp_path / "three")
    assert (first.folder / MODEL).read_bytes() == (third.folder / MODEL).read_bytes()
    assert second.manifest.capacity == 64
    assert [verdict.passed for verdict in gqa.cross_check([first.folder, third.folder], steps=2)] == [True]
    assert gqa.open_bundle(tmp_path / "one").manifest == first.manifest
    assert len(gqa.inspect(folder).spec.layers) == len(gqa.inspect(first.folder).spec.layers) == 3
    assert gqa.plan_export(folder).lines()


def test_a_session_gives_logits_of_every_new_token_and_keeps_its_cache(bundle) -> None:
    vocabulary = bundle.manifest.spec.vocabulary
    session = bundle.session(provider="cpu")
    whole = session.step([[5, 6, 7, 8], [9, 10, 0, 0]], [4, 2])
    assert whole.shape == (2, 4, vocabulary)
    assert session.lengths.tolist() == [4, 2]
    one = bundle.session(provider="cpu")
    pieces = [one.step([[token]]) for token in (5, 6, 7, 8)]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[0], whole[0], atol=2e-5)  # fp32, another order of sums
    assert one.cache()[0][0].shape[2] >= 4
    with pytest.raises(gqa.GqaExportError):
        one.step([[1], [2]])  # two rows over a cache of one


def test_sessions_in_two_threads_do_not_disturb_each_other(bundle) -> None:
    prompts, alone, together = ([[3, 4, 5]], [[11, 12, 13]]), {}, {}
    for number, prompt in enumerate(prompts):
        alone[number] = bundle.session(provider="cpu", threads=1).step(prompt)

    def run(number: int) -> None:
        session = bundle.session(provider="cpu", threads=1)
        for _ in range(20):
            session.reset(1)
            together[number] = session.step(prompts[number])

    workers = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number in (0, 1):
        np.testing.assert_array_equal(together[number], alone[number])


def test_a_completion_says_what_was_fed_and_what_came(bundle) -> None:
    pieces: list[str] = []
    done = bundle.complete(token_ids=[5, 6, 7], max_new_tokens=4, provider="cpu", on_text=pieces.append)
    again = bundle.complete(token_ids=[5, 6, 7], max_new_tokens=4, session=bundle.session(provider="cpu"))
    assert done.prompt_tokens == [5, 6, 7]
    assert done.tokens == again.tokens
    assert "".join(pieces).split() == [str(token) for token in done.tokens]  # no tokenizer: the numbers
    assert done.text is None
    with pytest.raises(gqa.GqaExportError) as refusal:
        bundle.complete()
    assert refusal.value.code == "E-OPTION-PROMPT"


def test_progress_is_a_callback_and_nothing_is_printed(folder, tmp_path, capfd) -> None:
    told: list[tuple[str, float | None, float | None]] = []

    def progress(text: str, done: float | None, total: float | None) -> None:
        told.append((text, done, total))

    gqa.export(folder, tmp_path / "out", progress=progress).validate(folder, steps=2, progress=progress)
    assert {"writing weights", "loading the checkpoint"} <= {text for text, *_ in told}
    assert capfd.readouterr() == ("", "")


def test_conversion_through_the_api_equals_the_option_strings(folder, tmp_path) -> None:
    one = gqa.convert(folder, tmp_path / "one", kv_heads=1)
    assert set(one.kv_heads) == {1}
    with pytest.raises(gqa.GqaExportError):
        gqa.convert(folder, tmp_path / "three", kv_heads=[3, 3, 3])


@pytest.mark.parametrize(("option", "value", "code"), [
    ("target", "tensorrt", "E-OPTION-CHOICE"), ("dtype", "float16", "E-OPTION-CHOICE"),
    ("cache", "x", "E-OPTION-CHOICE"), ("weights", "move", "E-OPTION-CHOICE"), ("logits", "first", "E-OPTION-CHOICE"),
    ("block", 7, "E-OPTION-CHOICE"), ("head", "int2", "E-OPTION-CHOICE"), ("activations", "fp8", "E-OPTION-CHOICE"),
    ("kv_cache", "int3", "E-OPTION-CHOICE"), ("tensor_parallel", 0, "E-OPTION-COUNT"),
    ("provider", "tpu", "E-OPTION-CHOICE"), ("capacity", 0, "E-OPTION-COUNT"), ("capacity", -3, "E-OPTION-COUNT")])
def test_a_value_outside_its_closed_set_is_refused_though_types_are_not_checked(folder, tmp_path, option, value, code):
    for call in (gqa.export, gqa.plan_export):
        with pytest.raises(gqa.GqaExportError) as refusal:
            call(folder, tmp_path / "out", **{option: value})
        assert (refusal.value.code, refusal.value.where) == (code, option)
    assert not (tmp_path / "out").exists()


def test_every_call_refuses_values_outside_their_sets(bundle, folder, tmp_path) -> None:
    calls = [lambda: bundle.validate(folder, level="all"), lambda: bundle.validate(folder, provider="tpu"),
             lambda: bundle.validate(folder, as_dtype="fp64"), lambda: bundle.validate(folder, steps=-1),
             lambda: gqa.convert(folder, tmp_path / "c", kv_heads=1, method="x"),
             lambda: gqa.convert(folder, tmp_path / "c", kv_heads=1, grouping="x"),
             lambda: gqa.build_engine(folder, tmp_path / "e", flavor="x"),
             lambda: gqa.build_engine(folder, tmp_path / "e", attention="x"),
             lambda: gqa.cross_check([bundle.folder, bundle.folder], level="all")]
    for call in calls:
        with pytest.raises(gqa.GqaExportError) as refusal:
            call()
        assert refusal.value.code in ("E-OPTION-CHOICE", "E-OPTION-COUNT")
    assert not list(tmp_path.iterdir())


def test_a_comparison_of_one_bundle_with_nothing_is_no_empty_list_of_verdicts(bundle) -> None:
    with pytest.raises(gqa.GqaExportError) as refusal:
        gqa.cross_check([bundle.folder])
    assert refusal.value.code == "E-OPTION-BUNDLES"


def test_a_revision_of_what_is_no_hub_id_is_never_dropped(bundle, folder, tmp_path) -> None:
    model = load(folder)
    for call in (lambda: gqa.inspect(bundle.folder, revision="v1"), lambda: gqa.inspect(folder, revision="v1"),
                 lambda: gqa.export(model, tmp_path / "out", revision="v1"),
                 lambda: bundle.validate(model, revision="v1"),
                 lambda: gqa.build_engine(bundle.folder, tmp_path / "out", revision="v1")):
        with pytest.raises(gqa.GqaExportError) as refusal:
            call()
        assert refusal.value.code == "E-OPTION-REVISION"


@pytest.mark.parametrize("ids", [[[1.5]], [["a"]], [[1, 2], [3]]], ids=["a fraction", "a word", "ragged rows"])
def test_ids_that_are_not_whole_numbers_are_refused_not_rounded(bundle, ids) -> None:
    with pytest.raises(gqa.GqaExportError) as refusal:
        bundle.session(provider="cpu").step(ids)
    assert refusal.value.code == "E-RUN-IDS"


def test_what_an_export_of_a_model_in_memory_cannot_see_its_validation_does(folder, tmp_path) -> None:
    model = load(folder)
    model.model.rotary_emb.inv_freq.mul_(1.5)  # no part of the state_dict
    exported = gqa.export(model, tmp_path / "buffer")
    assert not exported.validate(against=model, steps=2).passed
    hooked = load(folder)
    hooked.model.layers[0].mlp.register_forward_hook(lambda _module, _arguments, output: output * 2)
    exported = gqa.export(hooked, tmp_path / "hook")
    assert not exported.validate(against=hooked, steps=2).passed


def test_options_of_a_session_beside_an_open_one_are_refused(bundle) -> None:
    with pytest.raises(gqa.GqaExportError) as refusal:
        bundle.complete(token_ids=[5], max_new_tokens=1, session=bundle.session(provider="cpu"), low_memory=True)
    assert refusal.value.code == "E-OPTION-SESSION"
