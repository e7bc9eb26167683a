"""Rotations are proved by evaluation: every spelling of one is found, and what only looks like one is not."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from gqa_export.graph import edit
from gqa_export.lowering.rotary.find import Finder, position_ids
from gqa_export.lowering.rotary.verify import CHUNK, ELEMENTS, Rotation, prove, rotate

HEADS, SIZE, ROWS = 3, 8, 40
FREQUENCIES = (1 / 10.0 ** np.arange(4)).astype(np.float32)


class Build:
    """A graph with input_ids, past_lengths and x, made op by op; constants from numbers."""

    def __init__(self) -> None:
        ids, lengths, x = (gs.Variable(name, dtype, shape) for name, dtype, shape in (
            ("input_ids", np.int64, ("batch", "sequence")), ("past_lengths", np.int32, ("batch",)),
            ("x", np.float32, ("batch", "sequence", HEADS * SIZE))))
        self.graph, self.count = gs.Graph(inputs=[ids, lengths, x], opset=23), 0
        self.lengths, self.x = lengths, x
        sequence = self("Squeeze", self("Shape", ids, start=1, end=2))
        steps = self("Range", 0, sequence, 1)
        self.positions = self("Add", self("Cast", self("Unsqueeze", lengths, [1]), to=7), steps)

    def __call__(self, op: str, *inputs, **attrs) -> gs.Tensor:
        self.count += 1
        tensors = [each if isinstance(each, gs.Tensor) else edit.constant(
            f"c{self.count}_{place}", np.asarray(each, None if isinstance(each, np.ndarray) else np.int64))
            for place, each in enumerate(inputs)]
        return edit.add_node(self.graph, op, tensors, name=f"{op}_{self.count}", attrs=attrs)[0]

    def angles(self) -> gs.Tensor:
        """[B, S, R/2]"""
        return self("Mul", self("Cast", self("Unsqueeze", self.positions, [2]), to=1), FREQUENCIES)

    def heads(self) -> gs.Tensor:
        """x as [B, H, S, D]"""
        return self("Transpose", self("Reshape", self.x, [0, 0, HEADS, SIZE]), perm=[0, 2, 1, 3])

    def flat(self, x_BHSD: gs.Tensor) -> gs.Tensor:
        """Back to [B, S, H * D]"""
        return self("Reshape", self("Transpose", x_BHSD, perm=[0, 2, 1, 3]), [0, 0, HEADS * SIZE])

    def find(self, output: gs.Tensor, rows: int = ROWS):
        """What the finder says of `output`."""
        output.dtype, output.shape = np.float32, ("batch", "sequence", HEADS * SIZE)
        self.graph.outputs = [output]
        return Finder(self.graph, position_ids([self.lengths]), rows).find(output, HEADS, SIZE)


def rotate_half(build: Build, x: gs.Tensor, cos: gs.Tensor, sin: gs.Tensor) -> gs.Tensor:
    """x * cos + [-x2, x1] * sin, for cos and sin [B, S, D]"""
    cos, sin = (build("Unsqueeze", table, [1]) for table in (cos, sin))
    first, second = build("Slice", x, [0], [4], [3]), build("Slice", x, [4], [1 << 62], [3])
    turned = build("Concat", build("Neg", second), first, axis=-1)
    return build("Add", build("Mul", x, cos), build("Mul", turned, sin))


def tables(build: Build, factor: float = 1.0) -> list[gs.Tensor]:
    """cos and sin [B, S, D], both halves equal"""
    angles = build.angles()
    wide = build("Concat", angles, angles, axis=-1)
    return [build("Mul", build(op, wide), np.array(factor, np.float32)) for op in ("Cos", "Sin")]


def expected(rows: int, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(rows)[:, None].astype(np.float64) * FREQUENCIES
    return np.cos(angles) * factor, np.sin(angles) * factor


def test_rotate_half_with_a_factor_is_found_and_its_tables_are_evaluated():
    build = Build()
    region, rotation = build.find(build.flat(rotate_half(build, build.heads(), *tables(build, 1.25))))
    assert region.source is build.x
    assert (rotation.layout, rotation.interleaved, rotation.size) == ("flat", False, SIZE)
    for table, wanted in zip((rotation.cos, rotation.sin), expected(ROWS, 1.25)):
        np.testing.assert_allclose(table, wanted, atol=1e-5)  # fp32 angles up to 40: 40 * 2^-24


def test_tables_longer_than_a_chunk_are_joined_without_a_seam():
    build = Build()
    _, rotation = build.find(build.flat(rotate_half(build, build.heads(), *tables(build))), rows=CHUNK + 5)
    assert rotation.cos.shape == (CHUNK + 5, SIZE // 2)
    np.testing.assert_allclose(rotation.cos, expected(CHUNK + 5)[0], atol=1e-3)  # fp32 angles up to 2053


def test_many_heads_are_evaluated_a_few_positions_at_a_time():
    """128 heads of 128 at 2,048 positions are 134 MB a tensor, and an evaluator holds several."""
    rows, heads, size = 1500, 128, 128
    angles = np.arange(rows)[:, None] / 10_000 ** (np.arange(size // 2) / size)
    table = Rotation("BSHD", False, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))
    sizes = []

    class Probe:
        """A rotation by `table`, which notes what it is given."""

        layout, head_size = "BSHD", size

        def __call__(self, x_BSHD, positions_BS):
            sizes.append(x_BSHD.size)
            return rotate(x_BSHD, table, positions_BS)

    probe = Probe()
    probe.heads = heads
    found = prove(probe, rows)
    assert isinstance(found, Rotation)
    assert found.same_table(table)
    assert max(sizes[1:]) <= ELEMENTS, "the first call feeds a unit vector of each dimension"


def test_two_halves_turned_one_by_one_are_found():
    build = Build()
    angles = build.angles()
    cos, sin = (build("Unsqueeze", build(op, angles), [1]) for op in ("Cos", "Sin"))
    x = build.heads()
    first, second = build("Slice", x, [0], [4], [3]), build("Slice", x, [4], [8], [3])
    low = build("Sub", build("Mul", first, cos), build("Mul", second, sin))
    high = build("Add", build("Mul", second, cos), build("Mul", first, sin))
    _, rotation = build.find(build.flat(build("Concat", low, high, axis=-1)))
    assert not rotation.interleaved
    np.testing.assert_allclose(rotation.sin, expected(ROWS)[1], atol=1e-5)


def test_neighbours_turned_together_are_interleaved():
    build = Build()
    angles = build.angles()
    cos, sin = (build("Unsqueeze", build(op, angles), [1]) for op in ("Cos", "Sin"))
    x = build.heads()
    even, odd = build("Slice", x, [0], [8], [3], [2]), build("Slice", x, [1], [8], [3], [2])
    low = build("Sub", build("Mul", even, cos), build("Mul", odd, sin))
    high = build("Add", build("Mul", odd, cos), build("Mul", even, sin))
    both = build("Concat", build("Unsqueeze", low, [4]), build("Unsqueeze", high, [4]), axis=-1)
    _, rotation = build.find(build.flat(build("Reshape", both, [0, 0, 0, SIZE])))
    assert rotation.interleaved
    np.testing.assert_allclose(rotation.cos, expected(ROWS)[0], atol=1e-5)


def test_the_part_of_a_head_that_is_not_turned_is_seen():
    build = Build()
    x = build.heads()
    turned, rest = build("Slice", x, [0], [4], [3]), build("Slice", x, [4], [8], [3])
    first, second = build("Slice", turned, [0], [2], [3]), build("Slice", turned, [2], [4], [3])
    angles = build("Slice", build.angles(), [0], [2], [2])
    cos, sin = (build("Unsqueeze", build(op, angles), [1]) for op in ("Cos", "Sin"))
    low = build("Sub", build("Mul", first, cos), build("Mul", second, sin))
    high = build("Add", build("Mul", second, cos), build("Mul", first, sin))
    _, rotation = build.find(build.flat(build("Concat", low, high, rest, axis=-1)))
    assert rotation.size == 4


def test_a_norm_between_projection_and_rotation_is_where_it_starts():
    build = Build()
    normed = build("Softmax", build.heads(), axis=-1)
    region, rotation = build.find(build.flat(rotate_half(build, normed, *tables(build))))
    assert region.source is normed
    assert rotation.layout == "BHSD"


def test_without_positions_on_the_way_there_is_nothing():
    build = Build()
    assert build.find(build.flat(build.heads())) is None


def test_positions_inside_the_projected_tensor_are_no_rotation():
    build = Build()
    embedded = build("Add", build.x, build("Cast", build("Unsqueeze", build.positions, [2]), to=1))
    assert build.find(build.flat(build("Softmax", embedded, axis=-1))) is None


def broken(kind: str) -> tuple[Build, gs.Tensor]:
    build = Build()
    cos, sin = tables(build)
    x = build.heads()
    if kind == "longest":  # depends on the longest row, as `dynamic` rotary does
        longest = build("Cast", build("ReduceMax", build.positions, keepdims=0), to=1)
        cos = build("Mul", cos, build("Add", longest, np.array(1, np.float32)))
    if kind == "adds":
        return build, build.flat(build("Add", rotate_half(build, x, cos, sin), build("Unsqueeze", sin, [1])))
    if kind == "heads":
        each = np.arange(1, HEADS + 1, dtype=np.float32).reshape(1, HEADS, 1, 1)
        return build, build.flat(build("Mul", rotate_half(build, x, cos, sin), each))
    if kind == "two":
        cos, sin = (build("Unsqueeze", table, [1]) for table in (cos, sin))
        return build, build.flat(build("Add", build("Mul", x, cos), build("Mul", build("Softmax", x), sin)))
    if kind == "scales":
        return build, build.flat(build("Mul", x, build("Unsqueeze", cos, [1])))
    if kind == "squares":
        return build, build.flat(build("Mul", rotate_half(build, x, cos, sin), x))
    return build, build.flat(rotate_half(build, x, cos, sin))


@pytest.mark.parametrize(("kind", "reason"), [
    ("longest", "not a rotation by each token's own position"), ("adds", "it adds something"),
    ("heads", "heads are rotated differently"), ("two", "2 different tensors"),
    ("scales", "it turns no pair"), ("squares", "rotat|turns")])
def test_what_is_no_rotation_stays_outside_and_the_reason_is_given(kind, reason):
    build, output = broken(kind)
    found = build.find(output)
    assert isinstance(found, str)
    assert any(part in found for part in reason.split("|"))


def test_a_table_from_another_input_is_named():
    build = Build()
    cos, sin = tables(build)
    other = gs.Variable("other", np.float32, (1,))
    build.graph.inputs.append(other)
    found = build.find(build.flat(rotate_half(build, build.heads(), build("Mul", cos, other), sin)))
    assert isinstance(found, str)


def test_equal_rotations_share_a_table_and_different_ones_do_not():
    cos, sin = (table.astype(np.float32) for table in expected(5))
    one, two = Rotation("flat", False, cos, sin), Rotation("BHSD", False, cos.copy(), sin.copy())
    assert one.same_table(two)
    assert not one.same_table(Rotation("flat", True, cos, sin))
    assert not one.same_table(Rotation("flat", False, cos * 2, sin))


def test_rotation_keeps_the_length_of_every_head():
    cos, sin = (table.astype(np.float32) for table in expected(ROWS))
    x = np.random.default_rng(1).standard_normal((2, 5, HEADS, SIZE)).astype(np.float32)
    for interleaved in (False, True):
        y = rotate(x, Rotation("flat", interleaved, cos, sin), np.arange(10).reshape(2, 5))
        np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
