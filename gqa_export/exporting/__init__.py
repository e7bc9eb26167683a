"""The export: checkpoint -> trace -> lowering -> weights -> bundle, and from a bundle to an engine."""
