"""TensorRT for RTX in two pieces: what is packed comes back, in the folders where it is looked for."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from gqa_export.environment.tensorrt_libraries import SOURCES


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("carry_tensorrt")
    small = [{**one, "dict_size": 2**20} if "dict_size" in one else one for one in module.FILTERS]
    monkeypatch.setattr(module, "FILTERS", small)  # the real dictionary takes gigabytes of memory to compress
    return module


def test_pieces_hold_the_library_alone_and_the_rest_and_come_back_whole(script: ModuleType, tmp_path: Path) -> None:
    contents = {"onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_rtx.so.1.7.1": b"\x90" * 5000,
                "onnxruntime_ep_nv_tensorrt_rtx/libtensorrt_onnxparser_rtx.so.1.7.1": b"parser",
                "onnxruntime_ep_nv_tensorrt_rtx/libonnxruntime_providers_nv_tensorrt_rtx.so": b"not needed",
                "tensorrt_rtx_bindings/tensorrt_rtx.so": b"bindings", "tensorrt_rtx_bindings/__init__.py": b"",
                "tensorrt_rtx.dist-info/METADATA": b"Version: 1"}
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as wheel:
        for name, data in contents.items():
            wheel.writestr(name, data)
    library, rest = script.split([tmp_path / "one.whl"])
    assert set(library) == {"tensorrt_rtx_libs/libtensorrt_rtx.so.1.7.1"}
    assert len(rest) == 4
    assert "tensorrt_rtx_libs" in SOURCES["rtx"].packages
    for name, files in (("library", library), ("bindings", rest)):
        (tmp_path / f"{name}.xz").write_bytes(script.compress(files))
        assert script.main(["unpack", str(tmp_path / f"{name}.xz"), str(tmp_path / "there")]) == 0
    found = {str(path.relative_to(tmp_path / "there")): path.read_bytes()
             for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert found == {**library, **rest}


def test_versions_are_those_of_the_extra(script: ModuleType) -> None:
    listed = (Path(script.__file__).parent.parent / "pyproject.toml").read_text()
    for package in script.PACKAGES:
        assert f'"{package}"' in listed


def test_a_piece_that_was_cut_short_is_an_error_and_no_traceback(script: ModuleType, tmp_path: Path, capsys) -> None:
    (tmp_path / "library.xz").write_bytes(script.compress({"a/b": b"1" * 100000})[:-40])
    assert script.main(["unpack", str(tmp_path / "library.xz"), str(tmp_path / "there")]) == 2
    assert "copy it again" in capsys.readouterr().err
