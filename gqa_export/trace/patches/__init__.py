"""Equivalent code for the few parts of transformers that cannot be traced as they are written, one file a mechanism."""
