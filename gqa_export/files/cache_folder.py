"""Where what can be made again is kept between runs."""

from __future__ import annotations

from pathlib import Path


def cache_folder(purpose: str) -> Path:
    """The folder for one purpose ("traces", "kernels") in the user's cache folder, as platformdirs finds it:
    $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows. It need not exist."""
    import platformdirs

    return platformdirs.user_cache_path("gqa-export", appauthor=False) / purpose
