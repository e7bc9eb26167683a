"""The bundle format: the manifest, the files beside it, and the checks that a folder is what its manifest says."""
