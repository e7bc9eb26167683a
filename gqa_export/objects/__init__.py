"""What the public API hands out: `Bundle` and `Session`, and the closed sets that its options come from."""
