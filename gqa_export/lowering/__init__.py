"""The canonical model -> the dialect of a target: one list of passes a target."""
