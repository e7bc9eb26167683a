"""Continued pre-training of a converted checkpoint, by Hugging Face's Trainer."""
