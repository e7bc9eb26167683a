"""Deliberate damage to bundles, and the table of what `validate` catches of it."""
