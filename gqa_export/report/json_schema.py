"""`--json`: one verdict as `Verdict.to_dict` gives it, several in a list; held to `verdict.schema.json`.

The schema says which keys a reader may rely on. Keys are added without a new number; a key that goes or changes its
meaning makes `gqa_export.compare.verdict.SCHEMA_VERSION` one greater.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..compare.verdict import SCHEMA_VERSION
from .outcome import Outcome, environment

SCHEMA_FILE = Path(__file__).with_name("verdict.schema.json")


def document(outcome: Outcome) -> dict[str, Any]:
    """Plain data: the verdict's own, with what belongs to the run; `verdicts` where there are several or none."""
    run = {"schema_version": SCHEMA_VERSION, "passed": outcome.passed, "exit_code": outcome.exit_code,
           "drifts": [str(drift) for drift in outcome.drifts], "environment": environment(), "error": None}
    if outcome.problem is not None:
        run["error"] = {"what": outcome.problem.what, "where": outcome.problem.where, "fix": outcome.problem.fix}
    if len(outcome.verdicts) == 1:
        return outcome.verdicts[0].to_dict() | run
    return run | {"bundles": list(outcome.bundles), "against": outcome.against,
                  "verdicts": [verdict.to_dict() for verdict in outcome.verdicts]}


def text(outcome: Outcome) -> str:
    """The document as JSON; numbers that are not finite are strings ("inf", "nan")."""
    return json.dumps(document(outcome), indent=1, allow_nan=False) + "\n"
