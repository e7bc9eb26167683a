"""`--json`: one verdict as `Verdict.to_dict` gives it, several in a list; held to `verdict.schema.json`.

The schema says which keys a reader may rely on. It is generated (`scripts/write_schemas.py`) from the dataclasses of
`gqa_export.compare` and from `Run` below, so that each field is written down once. Keys are added without a new number;
a key that goes or changes its meaning makes `gqa_export.compare.verdict.SCHEMA_VERSION` one greater.
"""

from __future__ import annotations

import json
import types
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import TypeAliasType, TypedDict

from ..compare.case_verdict import CaseVerdict, KindVerdict
from ..compare.long_quality import LengthQuality, LongQuality
from ..compare.loss import Loss
from ..compare.verdict import LOSS_PROPERTIES, SCHEMA_VERSION, Verdict
from ..spec import Limits, OneOf
from .outcome import Outcome, environment

SCHEMA_FILE = Path(__file__).with_name("verdict.schema.json")
Number = TypeAliasType("Number", float | Literal["inf", "-inf", "nan"])
"""a number; one that is not finite is a word"""


class Problem(TypedDict):
    """Why a run came to no verdict."""

    code: str
    what: str
    where: str
    fix: str


class Run(TypedDict):
    """What belongs to the run, not to one verdict."""

    schema_version: Annotated[int, OneOf(SCHEMA_VERSION)]
    passed: bool
    exit_code: Annotated[int, OneOf(0, 1, 2, 3, 70)]
    drifts: list[str]
    environment: dict[str, str]
    error: Problem | None


PROPERTIES: dict[type, tuple[str, ...]] = {
    KindVerdict: ("passed",), CaseVerdict: ("passed", "first"), Loss: LOSS_PROPERTIES,
    Verdict: ("passed", "exit_code", "compared", "max_abs_logits", "max_abs_logits_eager", "first", "loss_label",
              "export_exact", "as_shipped", "long_label"),
    LongQuality: ("failures", "passed"), LengthQuality: ("loss", "perplexity", "exact_perplexity", "copy_score")}
"""properties that `Verdict.to_dict` writes beside the fields"""
LIMITS: dict[tuple[type, str], Any] = {(CaseVerdict, "kinds"): Limits(min_length=1),
                                       (Verdict, "exit_code"): OneOf(0, 1)}
"""what the annotation of a field does not tell"""


def document(outcome: Outcome) -> dict[str, Any]:
    """Plain data: the verdict's own, with what belongs to the run; `verdicts` where there are several or none."""
    problem = outcome.problem
    error: Problem | None = None
    if problem is not None:
        error = {"code": problem.code, "what": problem.what, "where": problem.where, "fix": problem.fix}
    run: Run = {"schema_version": SCHEMA_VERSION, "passed": outcome.passed, "exit_code": outcome.exit_code,
                "drifts": [str(drift) for drift in outcome.drifts], "environment": environment(), "error": error}
    if len(outcome.verdicts) == 1:
        return {**outcome.verdicts[0].to_dict(), **run}
    return {**run, "bundles": list(outcome.bundles), "against": outcome.against,
            "verdicts": [verdict.to_dict() for verdict in outcome.verdicts]}


def text(outcome: Outcome) -> str:
    """The document as JSON; numbers that are not finite are strings ("inf", "nan")."""
    return json.dumps(document(outcome), indent=1, allow_nan=False) + "\n"


@cache
def definitions() -> tuple[Any, Any]:
    """The types of the two documents, as TypedDicts: of one verdict, and of several or none."""
    run, verdict = get_type_hints(Run, include_extras=True), _as_json(Verdict)
    single = {**get_type_hints(verdict, include_extras=True), **run}
    many = {**run, "bundles": list[str], "against": str, "verdicts": list[verdict]}  # type: ignore[valid-type]
    return TypedDict("Single", single), TypedDict("Many", many)  # type: ignore[operator]


def schema() -> dict[str, Any]:
    """The JSON schema of a document, as generated from the definitions."""
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    single, many = definitions()
    either: Any = single | many
    return {"$schema": GenerateJsonSchema.schema_dialect, "title": "gqa-export validate --json",
            "description": "One verdict with the facts of its run; or, for several bundles or a run that came to no "
                           "verdict, the run with its verdicts. A number that is not finite is one of the words inf, "
                           "-inf, nan. Keys may be added; schema_version counts what breaks.",
            **TypeAdapter(either).json_schema()}


@cache
def _as_json(kind: type) -> Any:
    """The TypedDict of the JSON object that a dataclass becomes."""
    hints = get_type_hints(kind, include_extras=True)
    known = {field.name: hints[field.name] for field in fields(kind)}
    known |= {name: get_type_hints(getattr(kind, name).fget)["return"] for name in PROPERTIES.get(kind, ())}
    found = {name: _value(hint) for name, hint in known.items()}
    for (owner, name), limit in LIMITS.items():
        if owner is kind:
            found[name] = Annotated[found[name], limit]
    if kind is Verdict:
        found["schema_version"] = Annotated[int, OneOf(SCHEMA_VERSION)]
    return TypedDict(kind.__name__, found)  # type: ignore[operator]


def _value(hint: Any) -> Any:
    """A type as JSON holds it: a dataclass is an object, a number may be a word."""
    if is_dataclass(hint):
        return _as_json(hint)  # type: ignore[arg-type]
    if hint is float:
        return Number
    origin, parts = get_origin(hint), tuple(_value(part) for part in get_args(hint))
    if origin in (Union, types.UnionType):
        return reduce(or_, parts)
    return origin[parts] if origin in (tuple, dict, list) else hint
