"""`python -m gqa_export` is `gqa-export`."""

from .cli import entry

if __name__ == "__main__":
    entry()
