"""Which distributions are installed. Standard library only."""

from __future__ import annotations

from importlib import metadata

NOT_INSTALLED = "not installed"


def installed_version(distribution: str) -> str:
    """Version of an installed distribution, "" if it is not installed."""
    try:
        return metadata.version(distribution) or ""
    except metadata.PackageNotFoundError:
        return ""


def installed_names(prefix: str) -> list[str]:
    """Names of the installed distributions that begin with `prefix`, lower case with hyphens, sorted."""
    names = {(dist.metadata["Name"] or "").lower().replace("_", "-") for dist in metadata.distributions()}
    return sorted(name for name in names if name.startswith(prefix))
