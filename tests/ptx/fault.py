"""What a check of the interpreter finds."""

from __future__ import annotations


class Fault(Exception):
    """The kernel did what it must not: an access outside an allocation, a race, a read of what is not there yet."""
