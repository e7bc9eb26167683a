"""Reads TensorRT's build log (VERBOSE, profiling verbosity DETAILED), for engines that cannot be opened here.

The log lists every layer of every profile under "Layers:", those of profile n > 0 marked "[profile n]", and the
tensors under "I/O Tensors:". Nothing else tells on a machine without a GPU.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

LAYER = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[")
TENSOR = re.compile(r"\{ Name: (?P<name>[^,]+),")
IO = re.compile(r"^\s*Name: (?P<name>[^,]+), IOMode: (?P<mode>Input|Output), DataType: (?P<type>\w+), "
                r"Dimensions: \[(?P<shape>[-0-9,]*)\]")
PROFILE = re.compile(r" \[profile (\d+)\]")
NO_KERNEL = re.compile(r"not supported by a dedicated kernel|is_?decomposable", re.IGNORECASE)
DATATYPE = re.compile(r"Datatype: (\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
GEMM, CODES = "gemm", frozenset({"FP8", "FP4E2M1"})
PLUGIN = "PluginV3"
NOTHING = "NoOp"
COLLECTIVE = "comm_"
COLLECTIVES = {"comm_allreduce": "all_reduce", "comm_allgather": "all_gather"}
"""kind of a layer -> the operation as the graph names it"""


@dataclass(frozen=True)
class Layer:
    """One layer of one profile: what it reads and writes, without the profile's mark; the types of what it reads, of
    constants among that, and the graph's nodes that it is made of."""

    name: str
    kind: str
    profile: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    types: tuple[str, ...] = ()
    constant_types: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Log:
    """The layers, in order, and the inputs and outputs: name -> (mode, type, shape)."""

    layers: tuple[Layer, ...]
    tensors: dict[str, tuple[str, str, tuple[int, ...]]]

    def plugins(self, profile: int) -> int:
        """Number of plugin layers in a profile."""
        return sum(layer.kind == PLUGIN and layer.profile == profile for layer in self.layers)

    def kinds(self, profile: int) -> dict[str, int]:
        """How many layers of each kind a profile has."""
        return dict(Counter(layer.kind for layer in self.layers if layer.profile == profile))

    def products_of_codes(self, profile: int) -> set[str]:
        """Nodes of the graph that are within a product of a profile whose input and weight are both codes of FP8, or
        both of FP4."""
        return {name for layer in self.layers if layer.profile == profile and layer.kind == GEMM
                and CODES & set(layer.types) & set(layer.constant_types) for name in layer.nodes}

    def collectives(self, profile: int) -> list[tuple[str, str]]:
        """Where a profile meets other ranks, in order: the operation and the node of the graph."""
        return [(COLLECTIVES.get(layer.kind, layer.kind), layer.name) for layer in self.layers
                if layer.profile == profile and layer.kind.startswith(COLLECTIVE)]

    def copies(self, cache: set[str]) -> list[str]:
        """Layers that move a cache tensor without being attention: reformats and copies of it, in any profile.

        cache: names of the past and present tensors. A layer that is there in name only (NoOp) moves nothing.
        """
        found = []
        for layer in self.layers:
            touched = cache & {*layer.reads, *layer.writes}
            mover = "copy" in layer.name.lower() or layer.kind in ("Reformat", "Copy", "memcpy", "Identity")
            if touched and mover and layer.kind != NOTHING:
                found.append(f"{layer.name} ({layer.kind}, profile {layer.profile})")
        return found


def read_log(text: str) -> Log:
    """Parse a build log. Lists that are not there are empty."""
    layers: list[Layer] = []
    tensors: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    inside = False
    for line in text.splitlines():
        if line.rstrip().endswith("Layers:"):
            inside, layers, tensors = True, [], {}
        elif inside and (match := IO.match(line)):
            shape = tuple(int(size) for size in match["shape"].split(",") if size)
            tensors[match["name"]] = (match["mode"], match["type"], shape)
        elif inside and (match := LAYER.match(line)):
            layers.append(_layer(line, match))
        elif inside and "Engine Metadata" in line:
            inside = False
    return Log(tuple(layers), tensors)


def _layer(line: str, match: re.Match[str]) -> Layer:
    number = PROFILE.search(match["name"]) or PROFILE.search(line)
    before, _, after = line.partition("Outputs: [")
    reads, writes = (tuple(PROFILE.sub("", name) for name in TENSOR.findall(part)) for part in (before, after))
    types, constants = (tuple(DATATYPE.findall(part)) for part in before.partition("Constants: [")[::2])
    return Layer(PROFILE.sub("", match["name"]), match["kind"], int(number[1]) if number else 0, reads, writes, types,
                 constants, tuple(PROFILE.sub("", name) for name in NODE.findall(after)))


def lacks_kernel(text: str) -> bool:
    """Whether a build failed because TensorRT has no kernel of its own for an attention layer."""
    return NO_KERNEL.search(text) is not None


def last_lines(text: str, count: int = 8) -> str:
    """The end of a log as people read it: errors if there are any, else the last lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"\[(E|!)\]|terminate|.*(Error|error:|Assertion|Segmentation)", line)]
    return "\n".join(line[:400] for line in (errors or lines)[-count:])
