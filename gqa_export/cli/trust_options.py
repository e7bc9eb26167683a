"""`--allow-pickle`, for every verb that reads a checkpoint. Imports the standard library and click only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click


def trust_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option and set the permission around it."""

    @wraps(command)
    def wrapped(*args: Any, allow_pickle: bool, **given: Any) -> Any:
        from ..checkpoint.pickle_permission import Trust, trusting

        with trusting(Trust(pickle=allow_pickle)):
            return command(*args, **given)

    option = click.option("--allow-pickle", is_flag=True, help="Also read weights from pickle files; no code is run.")
    return option(wrapped)
