"""The plugin's kernels for one graph: which variants its attention nodes launch, compiled once, kept for the next time.

A compiled file depends on its variant, the capability, Triton and the kernels' source; it is kept under that key in a
folder of the user's, so that the second engine of a model compiles nothing. A folder that cannot be written is no
error: then everything is compiled.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import GqaExportError, InvalidBundle
from ..files.cache_folder import cache_folder
from ..files.sha256 import files_sha256
from ..progress import Progress
from ..spec import SHORT_DTYPES

if TYPE_CHECKING:
    import onnx
    from gqa_plugins.grouped_attention.cubin import Variant

CACHE = "GQA_EXPORT_KERNEL_CACHE"
SOURCES = ("append", "cubin", "decode", "long_attend", "long_launch", "long_prefill", "long_rows", "long_select",
           "plan", "prefill", "primitives", "recipes")


@dataclass(frozen=True)
class Compiled:
    """keys: variant's name -> capability -> sha256 of its file. container: all files, each once."""

    keys: dict[str, dict[int, str]]
    container: bytes

    @property
    def sha256(self) -> str:
        """Of the container: what a manifest and a runtime compare."""
        return hashlib.sha256(self.container).hexdigest()


def wanted_variants(model: onnx.ModelProto, capacity: int, dtype: str) -> tuple[Variant, ...]:
    """Every variant that the plugin nodes of a graph launch, each once, in the graph's order."""
    from gqa_plugins.grouped_attention import fields
    from gqa_plugins.grouped_attention.launch import Sizes, variants
    from gqa_plugins.grouped_attention.layers import LAYERS
    from onnx.helper import get_attribute_value

    graph = model.graph
    # a layer without a cache reads what another's node gives the graph
    shapes = {tensor.name: [axis.dim_value for axis in tensor.type.tensor_type.shape.dim]
              for tensor in (*graph.output, *graph.input)}
    producers = {output: node for node in graph.node for output in node.output}
    tables = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    found: dict[Variant, None] = {}
    for node in graph.node:
        if node.op_type != fields.NAME or node.domain not in ("", fields.NAMESPACE):
            continue
        values = {one.name: get_attribute_value(one) for one in node.attribute}
        stated = values.get("plugin_version", fields.PLUGIN_VERSION.encode()).decode()
        if stated not in LAYERS:
            raise InvalidBundle(f"the graph needs version {stated} of the plugin, this package has "
                                f"{' and '.join(LAYERS)}", f"attention node {node.name!r}",
                                "export the bundle again with this version: `gqa-export onnx --target trt-plugin`",
                                code="E-ENGINE-PLUGIN-VERSION")
        own = {name: value for name, value in values.items() if not name.startswith("plugin_")}
        layer = LAYERS[stated].from_fields(own, f"attention node {node.name!r}")
        inputs = dict(zip(fields.node_inputs(values), node.input, strict=True))
        past_key, past_value = shapes[inputs["past_key"]], shapes[inputs["past_value"]]
        table = _table(inputs["cos"], tables, producers) if layer.has_rotary else (1, 0)
        sizes = Sizes(1, 1, capacity, past_key[3], past_value[3], SHORT_DTYPES[dtype], table[1], table[0],
                      tables[inputs["projections"]][1] if layer.long else 0)
        found.update(dict.fromkeys(variants(layer, sizes).values()))
    return tuple(found)


def _table(name: str, tables: dict[str, list[int]], producers: dict[str, onnx.NodeProto]) -> tuple[int, int]:
    """Shape [M, R/2] of a rotary table, which may come through a Cast from its fp32 values."""
    while name not in tables:
        node = producers.get(name)
        if node is None or node.op_type not in ("Cast", "Identity", "Constant"):
            raise InvalidBundle(f"the rotary table {name} is not a constant", "attention node",
                                "export the bundle again: `gqa-export onnx --target trt-plugin`",
                                code="E-ENGINE-ROTARY")
        if node.op_type == "Constant":
            dims = node.attribute[0].t.dims
            return int(dims[0]), int(dims[1])
        name = node.input[0]
    return int(tables[name][0]), int(tables[name][1])


def kernel_folder() -> Path:
    """Where compiled kernels are kept: $GQA_EXPORT_KERNEL_CACHE, or `gqa-export/kernels` in the user's cache folder."""
    named = os.environ.get(CACHE)
    return Path(named) if named else cache_folder("kernels")


def toolchain() -> str:
    """What a compiled file depends on beside its variant: Triton's version and the kernels' source."""
    import gqa_plugins.grouped_attention as package

    folder = Path(package.__file__).parent
    sources = files_sha256(folder / f"{name}.py" for name in SOURCES)
    try:
        return f"{version('triton')}-{sources}"
    except PackageNotFoundError as error:
        raise GqaExportError("the plugin's kernels are compiled with Triton, which is not installed",
                             "--attention plugin", "pip install 'gqa-export[plugins]', or use --attention native",
                             code="E-ENV-TRITON") from error


def compile_kernels(variants: Iterable[Variant], capabilities: Iterable[int], report: Progress) -> Compiled:
    """Compile what the cache does not have. Raises GqaExportError for a missing Triton or an unknown capability."""
    from gqa_plugins.grouped_attention.cubin import Cubin, compile_variant
    from gqa_plugins.grouped_attention.fields import pack

    tools, folder = toolchain(), kernel_folder()
    work = [(variant, capability) for variant in variants for capability in capabilities]
    keys: dict[str, dict[int, str]] = {}
    files = []
    for done, (variant, capability) in enumerate(work):
        report(f"compiling kernels for {capability // 10}.{capability % 10}", done, len(work))
        name = hashlib.sha256(f"{tools} {variant.name} {capability}".encode()).hexdigest()
        data = _cached(folder / name)
        if data is None:
            data = compile_variant(variant, capability).to_bytes()
            _keep(folder / name, data)
        Cubin.from_bytes(data)
        files.append(data)
        keys.setdefault(variant.name, {})[capability] = hashlib.sha256(data).hexdigest()
    return Compiled(keys, pack(files))


def _cached(path: Path) -> bytes | None:
    from gqa_plugins.grouped_attention.cubin import Cubin

    try:
        data = path.read_bytes()
        Cubin.from_bytes(data)
        return data
    except (OSError, GqaExportError):  # not there, or damaged: compile it (again)
        return None


def _keep(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError:
        return
