"""Targets `trt-plugin` and `trt-native`."""
