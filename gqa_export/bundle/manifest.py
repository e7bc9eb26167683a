"""The manifest of a bundle, `gqa_export.json`: its fields, and reading it without trusting it.

A bundle is a folder with `model.onnx`, its weights, the manifest and the tokenizer's files.

The dataclasses are the one definition of the format: their annotations carry the bounds, pydantic holds a file to them,
and `manifest.schema.json` beside this file is generated from them (`scripts/write_schemas.py`). pydantic is imported
when the first manifest is read, which costs 0.1 to 0.2 s; msgspec would cost 0.03 s, but ignores unknown fields of
dataclasses. The text is parsed by `json` once before: pydantic's parser accepts NaN and names that occur twice.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from ..errors import InvalidBundle
from ..graph_io import TensorFact
from ..spec import (
    DTYPES,
    FAIL_FAST,
    MOST_LAYERS,
    STRICT,
    Count,
    Fallback,
    KvCache,
    Limits,
    ModelSpec,
    OneOf,
    Size,
    Text,
    WindowCache,
)
from .engine_facts import EngineFacts
from .long_facts import LongFacts
from .manifest_rules import check_names, check_tensors, check_weights, check_windows
from .parallel import ParallelFacts
from .quantization import Quantization
from .recorded_verdict import RecordedVerdict

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

MANIFEST = "gqa_export.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
FORMAT = 1
SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")
MOST_MANIFEST_BYTES = 1 << 26
MOST_BYTES = 1 << 53
MOST_TENSORS = 8 * MOST_LAYERS
MOST_ENTRIES = 1 << 16
"""of any object in a manifest: a reader that lists every wrong entry of a hostile one would need gigabytes"""
EXPORT_AGAIN = "export the bundle again with this version of gqa-export"

Bytes = Annotated[int, Limits(ge=0, le=MOST_BYTES)]
Version = Annotated[str, Limits(pattern="^[0-9]{1,6}([.][0-9]{1,6}){0,3}$")]
Digest = Annotated[str, Limits(pattern="^([0-9a-f]{64})?$")]
Ids = Annotated[list[Count], Limits(max_length=1 << 10, fail_fast=True)]
Tensors = Annotated[tuple[TensorFact, ...], Limits(max_length=MOST_TENSORS, fail_fast=True)]


@dataclass(frozen=True)
class FileFact:
    """A file of the bundle. Written by us: `sha256`. Linked or in place: `mtime_ns` and `header_sha256` (of the
    safetensors header) instead, and `sha256` only with `--hash`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    size: Bytes
    sha256: Digest = ""
    mtime_ns: Annotated[int, Limits(ge=0, le=1 << 63)] = 0
    header_sha256: Digest = ""


class Tokens(TypedDict, total=False):
    """Ids of the special tokens; tokenizer: whether the tokenizer's files are in the bundle."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    eos: Ids
    bos: Count | Ids | None
    pad: Count | Ids | None
    tokenizer: bool


@dataclass(frozen=True)
class Manifest:
    """Everything a reader of a bundle may need, as `gqa_export.json`.

    Attributes:
        target: the row of `gqa_export.targets` it was exported for.
        dtype: number format of the graph, "float32" or its short name "fp32".
        cache: "growing" or "static".
        capacity: tokens that the cache holds.
        logits: "all" new tokens, or the "last" of each sequence.
        weights: "copy", "link" or "inplace".
        spec: the model, layer by layer.
        inputs, outputs: of the graph, in its order.
        fallbacks: layers that the target's best operator could not hold.
        files: every file of the bundle but the manifest, by name.
        source: checkpoint (path or hub id), kind, stored dtype and other facts of where it came from.
        tokens: ids of the special tokens.
        versions: of the packages that made it.
        bytes_copied, bytes_linked: of weights.
        engine: of an engine bundle, its engine; None where the bundle holds a graph.
        quantization: of its weights; None where all are floating-point numbers and the checkpoint's were too.
        kv_cache: how the cache is quantized; None where it holds floating-point numbers.
        parallel: of a bundle that is cut over ranks, how; None for one graph or engine, and then not written.
        long: of a bundle with a graph for long prompts, that graph; None, and not in the file, where there is none.
        ragged_chunks: rows of a batch may bring several tokens each, over a past, in one call: the attention op gets
            their numbers. Not in the file where it does not.
        needs: package -> the first version of it that runs the bundle, beyond what this package takes. Not in the file
            where there is none.
        verify_width: new tokens of one step over a past whose logits the suite compares, each: what speculation may
            check at once. 1 where the logits are those of the last token, 0 in a manifest that does not know.
        window_cache: layers whose cache is a ring of fewer slots than the capacity; None, and not in the file, where
            there is none.
        verdict: what the comparison with the checkpoint found; None, and not in the file, where none was recorded.
        format: of the manifest.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    target: Text
    dtype: Annotated[str, OneOf(*DTYPES, *DTYPES.values())]
    cache: Annotated[str, OneOf("growing", "static")]
    capacity: Size
    logits: Annotated[str, OneOf("all", "last")]
    weights: Text
    spec: ModelSpec
    inputs: Tensors
    outputs: Tensors
    fallbacks: Annotated[tuple[Fallback, ...], Limits(max_length=MOST_LAYERS, fail_fast=True)] = ()
    files: Annotated[dict[Text, FileFact], FAIL_FAST] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    tokens: Tokens = field(default_factory=Tokens)
    versions: Annotated[dict[Text, Text], FAIL_FAST] = field(default_factory=dict)
    bytes_copied: Bytes = 0
    bytes_linked: Bytes = 0
    engine: EngineFacts | None = None
    quantization: Quantization | None = None
    kv_cache: KvCache | None = None
    parallel: ParallelFacts | None = None
    verify_width: Count = 0
    format: Annotated[int, OneOf(FORMAT)] = FORMAT
    long: LongFacts | None = None
    window_cache: WindowCache | None = None
    ragged_chunks: bool = False
    needs: Annotated[dict[Text, Version], FAIL_FAST] = field(default_factory=dict)
    verdict: RecordedVerdict | None = None

    def to_json(self) -> str:
        """Stable, readable JSON."""
        facts = asdict(self)
        for name in ("parallel", "long", "ragged_chunks", "needs", "window_cache", "verdict"):
            if not facts[name]:
                del facts[name]
        for weight in (facts["quantization"] or {}).get("weights", ()):
            for name in ("inputs", "input_scale", "inputs_reason"):
                if not weight[name]:
                    del weight[name]
        for layer in facts["spec"]["layers"]:
            if layer["owner"] is None:
                del layer["owner"]
        return json.dumps(facts, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST) -> Manifest:
        """Parse a manifest.

        Raises:
            InvalidBundle: the text is not JSON, has another format, or breaks a rule; names `where` and the field.
        """
        try:
            data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise InvalidBundle(f"the manifest is not valid JSON: {error}", where, EXPORT_AGAIN,
                                code="E-BUNDLE-JSON") from error
        found = data.get("format") if isinstance(data, dict) else None
        if isinstance(found, int) and found != FORMAT:
            raise InvalidBundle(f"the manifest has format {found}, this version reads format {FORMAT}", where,
                                EXPORT_AGAIN, code="E-BUNDLE-FORMAT")
        from pydantic import ValidationError

        try:
            manifest = adapter().validate_json(text)
        except ValidationError as error:
            if error.errors(include_url=False)[0]["type"] == "json_invalid":
                raise InvalidBundle(f"the manifest is not valid JSON: {first_error(error)}", where, EXPORT_AGAIN,
                                    code="E-BUNDLE-JSON") from error
            raise InvalidBundle(f"not a valid bundle manifest: {first_error(error)}", where, EXPORT_AGAIN,
                                code="E-BUNDLE-MANIFEST") from error
        check_names(manifest.files, manifest.engine.file if manifest.engine else "", where)
        check_tensors(manifest.spec, manifest.dtype, manifest.inputs, manifest.outputs, where, manifest.kv_cache,
                      manifest.window_cache)
        check_windows(manifest.window_cache, manifest.spec, manifest.cache, manifest.capacity, where)
        check_weights(manifest.quantization, where)
        problem = manifest.long.problem(manifest.spec.layers, manifest.capacity) if manifest.long else ""
        if problem:
            raise InvalidBundle(f"not a valid bundle manifest: {problem}", where, EXPORT_AGAIN,
                                code="E-BUNDLE-MANIFEST")
        return replace(manifest, dtype=DTYPES.get(manifest.dtype, manifest.dtype))


@cache
def adapter() -> TypeAdapter[Manifest]:
    """The reader that pydantic makes of the definition."""
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a manifest, as generated from the definition."""
    from pydantic.json_schema import GenerateJsonSchema

    return {"$schema": GenerateJsonSchema.schema_dialect, **adapter().json_schema()}


def first_error(error: ValidationError) -> str:
    """The first field that is wrong, what is wrong with it and what was found there."""
    wrong = error.errors(include_url=False, include_context=False)[0]
    place = ""
    for part in wrong["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith(("constrained-", "function-")):
            place += f"{'.' if place else ''}{part[:80]}"
    found = "" if wrong["type"] == "missing" else f", found {str(wrong['input'])[:80]!r}"
    return f"{place or 'the whole'}: {wrong['msg']}{found}"


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not allowed in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(pairs) > MOST_ENTRIES or len(found) < len(pairs):
        raise ValueError(f"an object with {len(pairs)} entries, {len(found)} of them different, at most {MOST_ENTRIES}")
    return found


def read_manifest(folder: Path | str) -> Manifest:
    """The manifest of a bundle folder.

    Raises:
        InvalidBundle: the folder is missing or holds no readable, valid manifest.
    """
    path = Path(folder) / MANIFEST
    fix = "make one with `gqa-export onnx CHECKPOINT -o BUNDLE`"
    if Path(folder).is_file():
        raise InvalidBundle("this is a file; a bundle is the folder that holds it", str(folder),
                            f"give the folder: {Path(folder).absolute().parent}", code="E-BUNDLE-FOLDER")
    if not Path(folder).is_dir():
        raise InvalidBundle("the bundle folder does not exist", str(folder), fix, code="E-BUNDLE-MISSING")
    if not path.is_file():
        raise InvalidBundle(f"the folder is not a bundle: {MANIFEST} is missing", str(folder), fix,
                            code="E-BUNDLE-MISSING")
    try:
        if path.stat().st_size > MOST_MANIFEST_BYTES:
            raise InvalidBundle(f"the manifest has {path.stat().st_size} bytes, at most {MOST_MANIFEST_BYTES} are read",
                                str(path), "do not use this bundle", code="E-BUNDLE-SIZE")
        return Manifest.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise InvalidBundle(f"cannot read the manifest: {error.strerror}", str(path), "check its permissions",
                            code="E-BUNDLE-READ") from error
    except UnicodeDecodeError as error:
        raise InvalidBundle(f"the manifest is not valid UTF-8: {error}", str(path), fix,
                            code="E-BUNDLE-JSON") from error
