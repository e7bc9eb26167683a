"""What the user allows a checkpoint to be beyond data: nothing, unless an option allows it.

Checkpoints are opened in several stages; the permission is set once, around the whole command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Trust:
    """What is allowed. Code that comes with a checkpoint is never run: there is not a permission for that.

    Attributes:
        pickle: weights may be pickle files, read by PyTorch's restricted unpickler (tensors only, no code).
    """

    pickle: bool = False


NOTHING = Trust()
_TRUST: ContextVar[Trust] = ContextVar("trust", default=NOTHING)


def trust() -> Trust:
    """What is allowed here."""
    return _TRUST.get()


@contextmanager
def trusting(allowed: Trust) -> Iterator[None]:
    """Allow this inside."""
    token = _TRUST.set(allowed)
    try:
        yield
    finally:
        _TRUST.reset(token)
