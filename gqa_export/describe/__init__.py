"""What is known about a model or bundle without running it: attention layers, cache size, supported architectures."""
