"""Which weight gets how many bits: the options, or the first rule of a file that fits its name.

A file of rules is TOML:

    [[rule]]
    match = "model.layers.0.*"      # as in a shell; the first rule that matches a name decides
    bits = 8                        # 2, 4 or 8; 0 leaves the weight as it is, codes too
    block = 32                      # columns that share a scale
    kind = "int"                    # or "e4m3" of 8 bits (FP8), "e2m1" of 4 (NVFP4)
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import GqaExportError, cause_of
from ..quantized.facts import BLOCKS
from .matrices import Weight

METHODS = {"int4": 4, "int8": 8, "fp8": 8, "nvfp4": 4}
"""--quantize -> bits of the matrices between embedding and head"""
KINDS = {"fp8": "e4m3", "nvfp4": "e2m1"}
"""--quantize -> the kind of codes, where it is not "int" (`QuantizedMatrix.kind`)"""
BITS = (0, 2, 4, 8)
BITS_OF = {"int": BITS, "e4m3": (8,), "e2m1": (4,)}
DEFAULT_HEAD = "int8"
NO_RULE = "no rule names it"
FIX = 'write [[rule]] with match = "NAME*", bits = 0, 2, 4 or 8 and, if you like, block = 32 or kind = "e4m3"'


@dataclass(frozen=True)
class Rule:
    """bits 0: stays as it is. block 0: that of the options. kind: as of `QuantizedMatrix`."""

    match: str
    bits: int
    block: int = 0
    kind: str = "int"


@dataclass(frozen=True)
class Decision:
    """What becomes of a weight. bits 0: it stays as it is, for a reason. kind: as of `QuantizedMatrix`. open: neither a
    rule nor an option names its bits, so that they may be chosen by its error."""

    weight: Weight
    bits: int
    block: int
    reason: str = ""
    kind: str = "int"
    open: bool = False


def read_rules(path: Path) -> tuple[Rule, ...]:
    """The rules of a file.

    Raises:
        GqaExportError: it cannot be read, or an entry is not a rule.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GqaExportError(f"cannot read the rules: {error.strerror}", str(path), FIX,
                             code="E-OPTION-QUANTIZE-FILE") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise GqaExportError(f"cannot read the rules: {cause_of(error)}", str(path), FIX,
                             code="E-OPTION-QUANTIZE-FILE") from error
    entries = found.get("rule")
    if set(found) != {"rule"} or not isinstance(entries, list) or not entries:
        raise GqaExportError(f"expected [[rule]] entries alone, found {sorted(found) or 'nothing'}", str(path), FIX,
                             code="E-OPTION-QUANTIZE-FILE")
    return tuple(_rule(entry, f"{path}, rule {number}") for number, entry in enumerate(entries, 1))


def _rule(entry: Any, where: str) -> Rule:
    wrong = _wrong(entry)
    if wrong:
        raise GqaExportError(f"not a valid rule: {wrong}", where, FIX, code="E-OPTION-QUANTIZE-FILE")
    return Rule(entry["match"], entry["bits"], entry.get("block", 0), entry.get("kind", "int"))


def _wrong(entry: Any) -> str:
    if not isinstance(entry, dict):
        return "it is not a table"
    unknown = sorted(set(entry) - {"match", "bits", "block", "kind"})
    if unknown:
        return f"{unknown[0]!r} is not a field"
    if not isinstance(entry.get("match"), str):
        return "match is missing"
    if type(entry.get("bits")) is not int or entry["bits"] not in BITS:
        return f"bits is {entry.get('bits')!r}, expected {', '.join(map(str, BITS))}"
    if "kind" in entry and (not isinstance(entry["kind"], str) or entry["bits"] not in BITS_OF.get(entry["kind"], ())):
        return f"kind is {entry['kind']!r} of {entry['bits']} bits, expected \"int\", \"e4m3\" of 8 or \"e2m1\" of 4"
    if "block" in entry and (type(entry["block"]) is not int or entry["block"] not in BLOCKS):
        return f"block is {entry['block']!r}, expected {', '.join(map(str, sorted(BLOCKS)))}"
    return ""


def decide(weights: Sequence[Weight], bits: int, block: int, head: str, rules: Sequence[Rule] = (),
           kind: str = "int", tied: Sequence[Sequence[str]] = ()) -> list[Decision]:
    """What becomes of each weight.

    Args:
        weights: of the model.
        bits: of matrices that no rule names; 0 leaves them.
        block: columns that share a scale.
        head: of head and embedding: "int8", "same" as the others, or "none"; "" is the first, and leaves them open.
        rules: the first whose pattern matches a weight's name decides.
        kind: of codes, of matrices that no rule names; a head of "int8" has integers.
        tied: groups of names of one weight; a rule may have any of them.

    Raises:
        GqaExportError: a rule matches no weight, or one names a weight that `head` is for too.
    """
    used: set[Rule] = set()
    decisions = []
    names = {name: group for group in tied for name in group}
    for weight in weights:
        called = names.get(weight.name, (weight.name,))
        rule = next((rule for rule in rules if any(fnmatchcase(name, rule.match) for name in called)), None)
        used.update([rule] if rule else [])
        own, own_kind = bits, rule.kind if rule else kind
        if weight.role in ("head", "embedding"):
            own = {"int8": 8 if bits else 0, "same": bits, "none": 0}[head or DEFAULT_HEAD]
            own_kind = own_kind if rule or head == "same" else "int"
            if rule and head:
                raise GqaExportError(f"the rule {rule.match!r} names {weight.name}, and --head {head} is for it too",
                                     "--head", "leave out --head, or let no rule match head and embedding",
                                     code="E-OPTION-QUANTIZE-HEAD")
        own, reason = (rule.bits, f"a rule leaves it ({rule.match})") if rule else \
            (own, f"--head {head}" if bits else NO_RULE)
        if weight.role == "router" and not rule:
            own, reason = 0, "it chooses experts: a rounding would send tokens to others"
        if weight.role == "experts" and own and own_kind != "int":
            own, reason = 0, f"experts are not rounded to {own_kind}: a checkpoint's own codes are kept"
        if not weight.role:
            own, reason = 0, weight.reason
        is_open = bool(own) and not rule and (own == bits or not head)
        decisions.append(Decision(weight, own, (rule.block if rule else 0) or block, "" if own else reason,
                                  own_kind if own else "int", is_open))
    unused = [rule.match for rule in rules if rule not in used]
    if unused:
        raise GqaExportError(f"the rule {unused[0]!r} matches no weight of this model", unused[0],
                             f"the weights are called like {weights[len(weights) // 2].name if weights else '?'}; an "
                             "earlier rule may match them all", code="E-OPTION-QUANTIZE-RULE")
    return decisions
