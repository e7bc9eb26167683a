"""Which library builds for which GPUs; what cannot be is refused with what can."""

from __future__ import annotations

import pytest
from refusal import refused

from gqa_export.engine import choose_library as module
from gqa_export.engine.choose_library import choose
from gqa_export.environment import tensorrt_libraries
from gqa_export.environment.machine import Gpu
from gqa_export.errors import GqaExportError, NotCheckedHere


@pytest.fixture
def here(monkeypatch):
    """(capability of the GPU here or "", flavours installed here) -> this machine."""
    def put(capability: str = "", installed: tuple[str, ...] = ("tensorrt", "rtx")) -> None:
        gpus = (Gpu("Invented", capability, 1 << 30),) if capability else ()
        monkeypatch.setattr(module, "nvidia", lambda: ("13.0", gpus))
        monkeypatch.setattr(module, "is_there", lambda flavor: flavor in installed)

        def find(flavor: str) -> tensorrt_libraries.Library:
            if flavor not in installed:
                raise GqaExportError("not installed", flavor, "pip install")
            return tensorrt_libraries.Library(flavor, flavor, "1", ())

        monkeypatch.setattr(module, "find", find)

    return put


@pytest.mark.parametrize(("gpu", "installed", "flavor"), [
    ("", ("tensorrt", "rtx"), "rtx"), ("8.9", ("tensorrt", "rtx"), "tensorrt"), ("8.9", ("rtx",), "rtx"),
    ("", ("rtx",), "rtx")])
def test_auto_is_tensorrt_on_a_gpu_and_rtx_elsewhere(here, gpu, installed, flavor) -> None:
    here(gpu, installed)
    assert choose("auto", (), plugin=True).library.flavor == flavor


def test_rtx_builds_for_three_generations_unless_told_otherwise(here) -> None:
    here()
    assert choose("rtx", (), plugin=True).capabilities == (80, 89, 120)
    told = choose("rtx", ("12.0", "8.6", "8.6"), plugin=True)
    assert told.capabilities == told.engine_capabilities == told.kernel_capabilities == (86, 120)
    assert choose("rtx", ("7.5",), plugin=False).capabilities == (75,)


def test_current_is_the_gpu_at_hand_even_one_that_is_on_no_list(here) -> None:
    here("9.0")
    chosen = choose("rtx", ("current",), plugin=True)
    assert chosen.capabilities == (90,)
    assert chosen.engine_capabilities == (), "TensorRT is told to take the GPU at hand"
    here("8.9")
    assert choose("rtx", ("current",), plugin=True).engine_capabilities == (89,)


def test_tensorrt_builds_for_the_gpu_at_hand(here) -> None:
    here("9.0")
    for asked in ((), ("9.0",), ("current",)):
        chosen = choose("tensorrt", asked, plugin=True)
        assert chosen.capabilities == (90,)
        assert chosen.engine_capabilities == ()


@pytest.mark.parametrize("jetson", ["8.7", "11.0"])
def test_the_plugin_has_kernels_for_jetsons(here, jetson: str) -> None:
    """Orin is 8.7, Thor 11.0. TensorRT for RTX builds for neither ahead of time."""
    here(jetson)
    number = int(jetson.replace(".", ""))
    assert choose("tensorrt", (), plugin=True).kernel_capabilities == (number,)
    here("")
    with refused("E-OPTION-CAPABILITY"):
        choose("rtx", (jetson,), plugin=True)


def test_tensorrt_without_a_gpu_is_not_bad_input_but_cannot_be_done_here(here) -> None:
    here("")
    with pytest.raises(NotCheckedHere) as caught:
        choose("tensorrt", (), plugin=True)
    assert "--flavor rtx" in caught.value.fix
    with refused("E-ENV-GPU", NotCheckedHere):
        choose("rtx", ("current",), plugin=True)


@pytest.mark.parametrize(("gpu", "flavor", "asked", "plugin", "code", "fix"), [
    ("", "rtx", ("9.0",), True, "E-OPTION-CAPABILITY", "12.1"),
    ("", "rtx", ("7.5",), True, "E-OPTION-CAPABILITY", "--attention native"),
    ("8.9", "tensorrt", ("9.0",), True, "E-OPTION-CAPABILITY", "--flavor rtx"),
    ("", "rtx", ("ada",), True, "E-OPTION-CAPABILITY", "8.9"),
    ("", "rtx", ("8.",), True, "E-OPTION-CAPABILITY", "8.9"),
    ("", "rtx", ("8",), True, "E-OPTION-CAPABILITY", "8.9"),
])
def test_what_cannot_be_built_is_refused_with_what_can(here, gpu, flavor, asked, plugin, code, fix) -> None:
    here(gpu)
    with refused(code) as refusal:
        choose(flavor, asked, plugin=plugin)
    assert fix in refusal.error.fix
    assert refusal.error.exit_code == 2
