"""Continued pre-training of a converted checkpoint, by Hugging Face's Trainer."""

from __future__ import annotations

from .options import UptrainOptions
from .uptraining import Uptraining, uptrain

__all__ = ["UptrainOptions", "Uptraining", "uptrain"]
