"""What the C++ runtime reads: JSON, number formats and manifests, the latter written by Python's own classes."""

from __future__ import annotations

import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from .conftest import Programs
from .toy_bundle import engine_facts, manifest, write_bundle

VALID = [
    '{}', '[]', 'null', 'true', ' [1, -2.5, 3e2, 0, -0, 1E-3, 123456789012345678, 12345678901234567890] ',
    '{"a": {"b": [false, null, "x"]}, "c": ""}', r'"\" \\ \/ \b \f \n \r \t \u0041 \u00e9 \u20ac \ud83d\ude00"',
    '"\u00e9 \u20ac \U0001f600"', '[[[[[[[[[[]]]]]]]]]]', '{"": 0}', "\t\r\n1", '[0.1, 2.5e-8, 1.7976931348623157e308]',
]
INVALID = {
    "": "expected a value", "{": "expected a key", "[1,]": "expected a value", "[1 2]": "expected ']'",
    '{"a" 1}': "expected ':'", '{"a": 1,}': "expected a key", "{'a': 1}": "expected a key", "01": "something follows",
    "1.": "expected a value", ".5": "expected a value", "-": "expected a value", "1e": "expected a value",
    "nul": "expected a value", "NaN": "expected a value", "Infinity": "expected a value", '"a': "does not end",
    '"\n"': "control character", r'"\x"': "an escape", r'"\u12"': "four hexadecimal", r'"\ud83d"': "surrogate",
    r'"\udc00"': "surrogate", '{"a": 1, "a": 2}': 'key "a" is there twice', "1 1": "something follows",
    "[" * 70 + "]" * 70: "nested deeper than 64", '"\\': "an escape",
}


def shown(value: object) -> str:
    """A value as `probe_runtime json` prints it."""
    if isinstance(value, dict):
        items = sorted((key.encode(), item) for key, item in value.items())
        return "{" + "".join(f"s{key.hex()}:{shown(item)}," for key, item in items) + "}"
    if isinstance(value, list):
        return "[" + "".join(f"{shown(item)}," for item in value) + "]"
    if isinstance(value, str):
        return f"s{value.encode().hex()}"
    if isinstance(value, float) or (isinstance(value, int) and abs(value) >= 10**18):
        return f"float {float(value)!r}"
    return json.dumps(value)


def read_back(line: str) -> str:
    """The program's hexadecimal floats as Python's."""
    words = line.replace(",", " , ").replace("[", " [ ").replace("]", " ] ").replace(":", " : ").split()
    return "".join(f"float {float.fromhex(word)!r}" if "0x" in word else word for word in words)


def parse(programs: Programs, folder: Path, texts: list[str]) -> list[str]:
    paths = []
    for number, text in enumerate(texts):
        paths.append(folder / f"{number}.json")
        paths[-1].write_bytes(text.encode())
    return programs.run("probe_runtime", "json", stdin="".join(f"{path}\n" for path in paths)).splitlines()


def test_json_is_read_as_python_reads_it(programs: Programs, tmp_path: Path) -> None:
    said = parse(programs, tmp_path, VALID)
    assert [read_back(line) for line in said] == [shown(json.loads(text)).replace(" ", "").replace("float", "float ")
                                                  for text in VALID]


def test_what_is_not_json_is_refused_with_its_place(programs: Programs, tmp_path: Path) -> None:
    for said, (text, reason) in zip(parse(programs, tmp_path, list(INVALID)), INVALID.items(), strict=True):
        kind, what, where = said.split("|")
        assert kind == "error"
        assert what.startswith("not valid JSON: ")
        assert reason in what, text
        assert where.startswith("text, line ")
    assert parse(programs, tmp_path, ['{"a": 1,\n "b": oops}'])[0].endswith("text, line 2, column 7")


def test_json_cut_short_or_altered_never_crashes_the_reader(programs: Programs, tmp_path: Path) -> None:
    """Every prefix of a manifest, and 300 copies with altered bytes: each is read or refused, and reading goes on."""
    chance = random.Random(20260101)
    whole = manifest(engine_facts()).to_json()
    texts = [whole[:length] for length in range(0, len(whole), 37)]
    for _ in range(300):
        place = chance.randrange(len(whole))
        texts.append(whole[:place] + chance.choice('{}[]",:\\u0e+-x\n') + whole[place + 1:])
    said = parse(programs, tmp_path, texts)
    assert len(said) == len(texts)
    for one, text in zip(said, texts, strict=True):
        try:
            json.loads(text)
        except ValueError:
            assert one.startswith("error|not valid JSON"), text


@pytest.mark.parametrize(("name", "widen"), [
    ("fp16", lambda bits: bits.view(np.float16).astype(np.float32)),
    ("bf16", lambda bits: (bits.astype(np.uint32) << 16).view(np.float32)),
])
def test_every_16_bit_number_widens_exactly(programs: Programs, name: str, widen) -> None:
    done = subprocess.run([str(programs.folder / "bin" / "probe_runtime"), name], capture_output=True, check=True,
                          env=os.environ)
    found = np.frombuffer(done.stdout, np.uint32)
    expected = widen(np.arange(1 << 16, dtype=np.uint16)).view(np.uint32)
    nan = np.isnan(expected.view(np.float32))
    assert np.array_equal(found[~nan], expected[~nan])
    assert np.isnan(found[nan].view(np.float32)).all()


def read_manifest(programs: Programs, folder: Path, *, flavor: str = "tensorrt", version: str = "11.1.0",
                  capability: int = 89, plugin: str | Path = "-") -> str:
    return programs.run("probe_runtime", "manifest", folder, flavor, version, str(capability), plugin).strip()


def test_manifest_that_python_writes_is_read_whole(programs: Programs, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", plugin=False)
    sha256 = json.loads((folder / "gqa_export.json").read_text())["files"]["model.engine"]["sha256"]
    aliases = " ".join(f"present.{layer}.{part}=past_key_values.{layer}.{part}"
                       for layer in range(2) for part in ("key", "value"))
    assert read_manifest(programs, folder) == (
        f"tensorrt 11.1.0.106 file model.engine {sha256} capacity 16 batch 3 prompt 4 vocabulary 50 profiles 0 1 "
        f"capabilities 80 89 ends 2 7 aliases {aliases} plugin none")


def test_other_builds_of_the_same_release_are_accepted(programs: Programs, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", plugin=False)
    assert read_manifest(programs, folder, version="11.1.0.107").startswith("tensorrt")


@pytest.mark.parametrize(("here", "what", "fix"), [
    ({"flavor": "rtx"}, "the engine was built by TensorRT, this program runs with TensorRT-RTX",
     "build it with `gqa-export trt BUNDLE -o DIR --flavor rtx`, or compile this program with TensorRT_ROOT pointing "
     "to TensorRT"),
    ({"version": "11.2.0"}, "the engine was built by TensorRT 11.1.0.106, this machine has 11.2.0",
     "install TensorRT 11.1.0, or build the engine again here with `gqa-export trt BUNDLE -o DIR`"),
    ({"capability": 90}, "this GPU has compute capability 9.0, the engine was built for 8.0, 8.9",
     "build it with `gqa-export trt BUNDLE -o DIR --compute-capability 9.0`"),
    ({}, "the engine's attention layers need libgqa_plugin.so",
     "set it to the library's path (it is built from plugins/cpp), or build the engine with "
     "`gqa-export trt --attention native`"),
    ({"plugin": "nowhere.so"}, "there is no plugin library", "build it from plugins/cpp and give its path"),
])
def test_machine_that_does_not_fit_is_refused_with_the_fix(programs: Programs, tmp_path: Path, here: dict, what: str,
                                                           fix: str) -> None:
    folder = write_bundle(tmp_path / "bundle", plugin="capability" not in here)
    kind, said, _, remedy = read_manifest(programs, folder, **here).split("|")
    assert (kind, said, remedy) == ("error", what, fix)


def test_plugin_of_another_version_is_refused(programs: Programs, tmp_path: Path) -> None:
    for number, changes in enumerate(({"version": "4"}, {"contract_version": 2}, {"version": "3"},
                                      {"namespace": "other"})):
        facts = engine_facts(plugin=True)
        folder = write_bundle(tmp_path / str(number),
                              facts=replace(facts, plugin=replace(facts.plugin, **changes)))
        said = read_manifest(programs, folder)
        assert said.startswith("error|the engine needs plugin ")
        assert "this program knows gqa::GroupedQueryAttention version 1 to 3 (contract 1, of version 3 2)" in said


def test_engine_file_altered_missing_or_stripped_is_refused(programs: Programs, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "altered", plugin=False)
    with open(folder / "model.engine", "ab") as file:
        file.write(b" ")
    assert read_manifest(programs, folder).split("|")[1] == (
        "the engine's file is not the one that the manifest describes: its sha256 differs")
    (folder / "model.engine").unlink()
    assert read_manifest(programs, folder).split("|")[1] == "cannot read the file"
    stripped = write_bundle(tmp_path / "stripped", facts=replace(engine_facts(), stripped=True))
    assert "--strip-weights" in read_manifest(programs, stripped)


def changed(folder: Path, change) -> Path:
    path = folder / "gqa_export.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(("change", "what"), [
    (lambda data: data.pop("format"), "not the manifest of a bundle"),
    (lambda data: data.update(format=2), "manifest format 2 is not 1"),
    (lambda data: data.update(engine=None), "the bundle holds a graph for 'trt-plugin', not an engine"),
    (lambda data: data["engine"]["profiles"].pop(), "the engine lacks a decode or a prefill profile"),
    (lambda data: data["inputs"].pop(1), "the engine has no input past_lengths"),
    (lambda data: data["engine"]["aliases"].pop("present.0.key"),
     "the engine's output present.0.key is not in the memory of an input"),
    (lambda data: data["engine"].update(file="../model.engine"), "the engine's file lies outside the bundle"),
    (lambda data: data["engine"].pop("version"), 'expected a key "version"'),
    (lambda data: data["inputs"][0].update(dtype="float8"), "number format 'float8' is not known"),
    (lambda data: data["files"].clear(), 'expected a key "model.engine"'),
    (lambda data: data["engine"]["profiles"][0]["shapes"]["input_ids"].clear(), "expected an item 2"),
])
def test_manifest_that_is_not_whole_is_refused(programs: Programs, tmp_path: Path, change, what: str) -> None:
    folder = changed(write_bundle(tmp_path / "bundle", plugin=False), change)
    kind, said, where, fix = read_manifest(programs, folder).split("|")
    assert (kind, said) == ("error", what)
    assert where
    assert fix


def test_folder_without_a_manifest_is_refused(programs: Programs, tmp_path: Path) -> None:
    assert read_manifest(programs, tmp_path).startswith("error|the folder has no gqa_export.json")
