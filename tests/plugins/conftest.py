"""The kernel tests run through Triton's interpreter: the switch must be set before the kernels are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
