"""Tensor parallel: the canonical graph cut over ranks, and rank graphs put together again to be proved."""
