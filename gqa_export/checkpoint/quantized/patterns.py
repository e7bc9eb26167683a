"""Regular expressions of descriptions, by which they name modules."""

from __future__ import annotations

import re


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Whether a name matches a regular expression, from its start on or anywhere.

    Raises:
        ValueError: it is not one.
    """
    try:
        return (re.search if anywhere else re.match)(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
