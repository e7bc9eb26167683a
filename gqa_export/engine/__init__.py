"""A TensorRT dialect bundle -> an engine bundle. Importing this imports neither TensorRT nor Polygraphy nor torch.

`build.build_engine` checks, compiles the plugin's kernels, lets a process of its own build the engine
(`build_child`), reads the build log and writes the new bundle.
"""
