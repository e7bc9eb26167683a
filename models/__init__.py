"""Data about models: tiny test configurations and the few per-family quirks."""
