"""The plugin's fields: what is written is read back, and what is damaged is refused with the remedy."""

from __future__ import annotations

import hashlib

import pytest
from gqa_plugins.grouped_attention import fields
from gqa_plugins.grouped_attention.fields import CubinStore, Key, keys_text, node_inputs, node_outputs, pack, parse_keys
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused

from gqa_export import attention_op, long_attention_op
from gqa_export.errors import GqaExportError

ALL = {"has_new": 1, "has_rotary": 1, "has_sinks": 1}


def test_creation_fields_are_the_contract_s_attributes_and_three_flags() -> None:
    assert [name for name, _ in fields.CREATION] == [
        *attention_op.ATTRIBUTE_NAMES, "has_rotary", "has_sinks", "has_new"]
    assert {kind for _, kind in fields.CREATION} == {"int32", "float32"}
    assert fields.NAME == attention_op.OP
    assert fields.NAMESPACE == attention_op.DOMAIN
    assert str(attention_op.VERSION) == fields.PLUGIN_VERSION


def test_a_node_has_the_contract_s_inputs_that_its_flags_name() -> None:
    assert node_inputs(ALL) == attention_op.INPUT_NAMES
    assert node_inputs({"has_new": 1, "has_rotary": 0, "has_sinks": 0}) == attention_op.INPUT_NAMES[:7]
    assert node_inputs({"has_new": 0, "has_rotary": 0, "has_sinks": 1}) == (
        "query", "past_key", "past_value", "past_lengths", "new_lengths", "sinks")
    tables = long_attention_op.INPUT_NAMES[-3:]
    assert node_inputs({**ALL, "method": 1}) == long_attention_op.INPUT_NAMES
    assert node_inputs({**ALL, "method": 0}) == attention_op.INPUT_NAMES
    optional = {port.name for port in attention_op.INPUTS if port.optional}
    assert optional | set(tables) == set(fields.FLAG_OF_INPUT)


def test_a_layer_that_writes_nothing_has_one_output() -> None:
    assert node_outputs(ALL) == attention_op.OUTPUT_NAMES
    assert node_outputs({**ALL, "has_new": 0}) == ("output",)


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_a_container_gives_back_every_file_once(files: list[bytes]) -> None:
    container = pack(files)
    assert fields.unpack(container) == {hashlib.sha256(data).hexdigest(): data for data in files}
    assert len(container) <= 14 + sum(80 + len(data) for data in set(files))


@given(st.data())
def test_a_damaged_container_is_refused(data: st.DataObject) -> None:
    container = pack([b"first file", b"second\n\nfile"])
    place = data.draw(st.integers(0, len(container) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "more"]))
    damaged = {"flip": container[:place] + bytes([container[place] ^ 1]) + container[place + 1:],
               "cut": container[:place], "more": container + b"x"}[kind]
    with refused("E-ENGINE-KERNEL-CONTAINER") as caught:
        fields.unpack(damaged)
    assert "gqa-export trt" in caught.error.fix


def test_keys_are_written_sorted_and_read_back() -> None:
    keys = [Key("prefill", 120, "b" * 64), Key("append", 89, "a" * 64), Key("append", 80, "c" * 64)]
    assert keys_text(keys).decode().splitlines()[0] == "append 80 " + "c" * 64
    assert parse_keys(keys_text(keys)) == tuple(sorted(keys))
    assert parse_keys(b"") == ()


@pytest.mark.parametrize("text", [b"append 89 " + b"a" * 64, b"other 89 " + b"a" * 64 + b"\n", b"append 89 xyz\n",
                                  b"\n", b"append 8.9 " + b"a" * 64 + b"\n"])
def test_keys_of_another_form_are_refused(text: bytes) -> None:
    with pytest.raises(GqaExportError) as caught:
        parse_keys(text)
    assert "gqa-export trt" in caught.value.fix


def test_the_store_finds_kernels_whatever_the_order_of_the_layers() -> None:
    store = CubinStore()
    wanted = hashlib.sha256(b"kernel").hexdigest()
    with refused("E-ENGINE-KERNEL-ABSENT"):
        store.get(wanted)
    store.add(pack([b"other", b"kernel"]))
    assert store.get(wanted) == b"kernel"
    with pytest.raises(GqaExportError):
        store.add(pack([b"third"])[:-1])
    assert store.get(wanted) == b"kernel"


def test_a_layer_of_another_contract_is_refused_with_both_versions() -> None:
    fields.check_contract_version(attention_op.VERSION)
    with refused("E-ENGINE-OP-VERSION") as caught:
        fields.check_contract_version(2)
    assert "gqa-export trt" in caught.error.fix
