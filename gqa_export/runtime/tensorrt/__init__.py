"""Engine bundles, run by TensorRT or TensorRT for RTX on a GPU."""
