"""The heads of one attention layer as matrices in fp64, read from a checkpoint's files; and back into its tensors.

A head is [size, in + 1]: the rows that make it and, in the last column, their biases (zero where there are none), so
that whatever is done to rows is done to biases. An output head is [out, size]: the columns that it feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..errors import GqaExportError, UnsupportedModel
from ..weights.source_kinds import StoredSource
from .layout import Heads, LayerLayout


def read_tensor(source: StoredSource) -> torch.Tensor:
    """A whole stored tensor in its own type. Its memory is its own, no map of the file."""
    data = bytearray(source.tensor.nbytes)
    place = 0
    for chunk in source.chunks():
        data[place: place + chunk.nbytes] = chunk
        place += chunk.nbytes
    if not data:
        return torch.empty(source.shape, dtype=getattr(torch, source.dtype))
    return torch.frombuffer(data, dtype=getattr(torch, source.dtype)).reshape(source.shape)


class LayerHeads:
    """The heads of one layer. Tensors are read when they are first needed and kept as long as this object."""

    def __init__(self, layout: LayerLayout, read: Callable[[str], torch.Tensor]) -> None:
        self.layout, self._read = layout, read
        self._tensors: dict[str, torch.Tensor] = {}
        self._made: dict[tuple[str, int], torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter as stored."""
        if name not in self._tensors:
            self._tensors[name] = self._read(name)
        return self._tensors[name]

    def forget(self) -> None:
        """Free the tensors; they are read again when needed."""
        self._tensors.clear()
        self._made.clear()

    def _once(self, label: str, head: int, make: Callable[[int], torch.Tensor]) -> torch.Tensor:
        if (label, head) not in self._made:
            self._made[label, head] = make(head)
        return self._made[label, head]

    def rows(self, heads: Heads, head: int) -> torch.Tensor:
        """One head of queries, keys or values, [size, in + 1] fp64."""
        start, end = heads.starts[head], heads.starts[head] + heads.size
        weight = self.tensor(heads.weight)
        block = (weight[:, start:end].T if heads.transposed else weight[start:end]).double()
        bias = self.tensor(heads.bias)[start:end].double() if heads.bias else block.new_zeros(heads.size)
        return torch.cat((block, bias[:, None]), dim=1)

    def key(self, head: int) -> torch.Tensor:
        """[D, in + 1]."""
        return self._once("key", head, lambda head: self.rows(self.layout.key, head))

    def value(self, head: int) -> torch.Tensor:
        """[E, in + 1]."""
        return self._once("value", head, lambda head: self.rows(self.layout.value, head))

    def query(self, head: int) -> torch.Tensor:
        """[D, in + 1]."""
        return self.rows(self.layout.query, head)

    def output(self, head: int) -> torch.Tensor:
        """[out, E]; UnsupportedModel where the layer's output projection is not known."""
        heads = output_of(self.layout)
        start, end = heads.starts[head], heads.starts[head] + heads.size
        weight = self.tensor(heads.weight)
        return (weight[start:end].T if heads.transposed else weight[:, start:end]).double()

    def output_gram(self, head: int) -> torch.Tensor:
        """[E, E], the sum of O_h^T O_h over the query heads h of a key/value head."""
        def make(head: int) -> torch.Tensor:
            outputs = torch.cat([self.output(query) for query in self.queries_of(head)])
            return outputs.T @ outputs

        return self._once("gram", head, make)

    def value_gram(self, head: int) -> torch.Tensor:
        """[E, E], V V^T: needed once per number of heads that is looked at."""
        return self._once("value gram", head, lambda head: self.value(head) @ self.value(head).T)

    @property
    def group(self) -> int:
        """Query heads per key/value head, H / N."""
        return len(self.layout.query.starts) // len(self.layout.key.starts)

    def queries_of(self, head: int) -> range:
        """The query heads that read key/value head `head`."""
        return range(head * self.group, (head + 1) * self.group)


def output_of(layout: LayerLayout) -> Heads:
    """The output projection's heads; UnsupportedModel where it is not known."""
    if layout.output is None:
        raise UnsupportedModel("a norm or a gate lies between attention and its output projection, which therefore "
                               "cannot take up a change of the values", f"layer {layout.layer}, {layout.path}",
                               "use --method mean, first or random with --grouping contiguous",
                               code="E-CONVERT-NO-OUTPUT")
    return layout.output


def put(heads: Heads, tensors: Mapping[str, torch.Tensor], head: int, rows: torch.Tensor) -> None:
    """Write one head's [size, in + 1] into its weight and bias, rounded to their type."""
    start, end = heads.starts[head], heads.starts[head] + heads.size
    weight = tensors[heads.weight]
    check_range(rows, heads.weight, weight.dtype)
    if heads.transposed:
        weight[:, start:end] = rows[:, :-1].T.to(weight.dtype)
    else:
        weight[start:end] = rows[:, :-1].to(weight.dtype)
    if heads.bias:
        tensors[heads.bias][start:end] = rows[:, -1].to(weight.dtype)


def put_output(heads: Heads, tensors: Mapping[str, torch.Tensor], head: int, columns: torch.Tensor) -> None:
    """Write one head's [out, E] into the output projection, rounded to its type."""
    start, end = heads.starts[head], heads.starts[head] + heads.size
    weight = tensors[heads.weight]
    check_range(columns, heads.weight, weight.dtype)
    if heads.transposed:
        weight[start:end] = columns.T.to(weight.dtype)
    else:
        weight[:, start:end] = columns.to(weight.dtype)


def check_range(values: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    """GqaExportError if a value is not finite or does not fit the type it is stored in."""
    worst = float(values.abs().max()) if values.numel() else 0.0
    if not worst <= torch.finfo(dtype).max:  # false for NaN too
        raise GqaExportError(f"a converted weight has a value of {worst:g}, which {str(dtype).removeprefix('torch.')} "
                             "cannot hold", name, "check the checkpoint for infinite weights, or use --method mean",
                             code="E-CONVERT-OVERFLOW")
