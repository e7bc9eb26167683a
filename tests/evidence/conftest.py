"""The bundles that the tests of sessions use."""

from __future__ import annotations

from runtime.conftest import bundle, checkpoint

__all__ = ["bundle", "checkpoint"]
