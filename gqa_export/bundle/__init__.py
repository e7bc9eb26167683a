"""The bundle format: the manifest, the files beside it, and the checks of a folder against its manifest."""
