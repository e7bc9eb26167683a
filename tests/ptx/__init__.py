"""An interpreter of the PTX that the kernels are compiled to, and the tests that run the kernels on it."""
