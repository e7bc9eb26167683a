"""A TensorRT dialect bundle -> an engine bundle. Importing this imports neither TensorRT nor Polygraphy nor torch.

`build_engine` is the way in: it checks, compiles the plugin's kernels, lets a process of its own build the engine
(`child`), reads the build log and writes the new bundle.
"""

from .build import EngineBuild, EngineOptions, build_engine

__all__ = ["EngineBuild", "EngineOptions", "build_engine"]
