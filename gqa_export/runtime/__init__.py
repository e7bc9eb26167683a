"""Sessions that hold the KV cache and run a bundle step by step, and what is made of them: text, figures."""
