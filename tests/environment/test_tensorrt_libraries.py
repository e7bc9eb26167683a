"""Finding TensorRT's module and shared libraries, and making those visible by their bare names."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from refusal import refused

from gqa_export.environment import tensorrt_libraries
from gqa_export.environment.tensorrt_libraries import Library, bare_names, find, preload, visible


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """(package name -> files in it) -> only these can be found."""
    def put(**found: tuple[str, ...]) -> None:
        for name, files in found.items():
            (tmp_path / name).mkdir()
            for file in files:
                (tmp_path / name / file).write_bytes(b"not a library")

        def find_spec(name: str):
            return SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]) if name in found else None

        monkeypatch.setattr(tensorrt_libraries, "find_spec", find_spec)
        monkeypatch.setattr(tensorrt_libraries, "installed_version", lambda name: "1.7" if "bindings" in name else "")

    return put


def test_bare_names_are_all_that_a_loader_may_ask_for() -> None:
    assert bare_names("libtensorrt_rtx.so.1.7.1") == ["libtensorrt_rtx.so", "libtensorrt_rtx.so.1",
                                                      "libtensorrt_rtx.so.1.7", "libtensorrt_rtx.so.1.7.1"]
    assert bare_names("libx.so") == ["libx.so"]


def test_the_bindings_take_their_libraries_from_whatever_package_brings_them(packages) -> None:
    packages(tensorrt_rtx_bindings=(), onnxruntime_ep_nv_tensorrt_rtx=(
        "libtensorrt_onnxparser_rtx.so.1.7.1", "libtensorrt_rtx.so.1.7.1", "libonnxruntime_providers_x.so"))
    found = find("rtx")
    assert (found.module, found.version) == ("tensorrt_rtx_bindings", "1.7")
    assert [file.name for file in found.files] == ["libtensorrt_rtx.so.1.7.1", "libtensorrt_onnxparser_rtx.so.1.7.1"]


def test_the_whole_package_comes_before_the_bindings_alone(packages) -> None:
    packages(tensorrt_rtx=(), tensorrt_rtx_bindings=(), tensorrt_rtx_libs=("libtensorrt_rtx.so.1.7.1",),
             onnxruntime_ep_nv_tensorrt_rtx=("libtensorrt_rtx.so.1.6.0",))
    found = find("rtx")
    assert found.module == "tensorrt_rtx"
    assert [file.name for file in found.files] == ["libtensorrt_rtx.so.1.7.1"]


@pytest.mark.parametrize(("flavor", "extra"), [("rtx", "gqa-export[rtx]"), ("tensorrt", "gqa-export[trt]")])
def test_a_library_that_is_not_installed_is_an_error_with_the_command(packages, flavor, extra) -> None:
    packages()
    assert not tensorrt_libraries.is_there(flavor)
    with refused("E-ENV-TENSORRT") as refusal:
        find(flavor)
    assert extra in refusal.error.fix


def test_a_process_sees_the_links_before_anything_else_and_they_are_gone_after(tmp_path, monkeypatch) -> None:
    file = tmp_path / "libtensorrt_rtx.so.1.7.1"
    file.write_bytes(b"")
    monkeypatch.setenv(tensorrt_libraries.SEARCH_PATH, "elsewhere")
    with visible(Library("rtx", "tensorrt_rtx", "1.7", (file,))) as environment:
        first, second = environment[tensorrt_libraries.SEARCH_PATH].split(os.pathsep)
        assert second == "elsewhere"
        assert sorted(os.listdir(first)) == sorted(bare_names(file.name))
        assert all((Path(first) / name).resolve() == file for name in os.listdir(first))
        assert environment["PATH"] == os.environ["PATH"] or tensorrt_libraries.SEARCH_PATH == "PATH"
    assert not Path(first).exists()
    with visible(Library("rtx", "tensorrt_rtx", "1.7", ())) as environment:
        assert environment[tensorrt_libraries.SEARCH_PATH] == "elsewhere"


def test_a_damaged_library_is_named(tmp_path) -> None:
    (tmp_path / "libtensorrt_rtx.so").write_bytes(b"not a library")
    with refused("E-ENV-TENSORRT") as refusal:
        preload(Library("rtx", "tensorrt_rtx", "1.7", (tmp_path / "libtensorrt_rtx.so",)))
    assert "libtensorrt_rtx.so" in refusal.error.what
    assert "--force-reinstall" in refusal.error.fix
