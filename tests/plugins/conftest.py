"""The kernel tests run through Triton's interpreter: the switch must be set before the kernels are imported."""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def patch_each_function_once_per_launch():
    """Halve the tests' time: the interpreter rebinds all of `triton.language` at every call of a device function.

    That is 3 ms of introspection per call (measured in Triton 3.9), and the binding of the first call in a launch
    still stands at the second. Where Triton is built otherwise, nothing is changed.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    executor, patch = getattr(interpreter, "GridExecutor", None), getattr(interpreter, "_patch_lang", None)
    if executor is None or patch is None:
        yield
        return
    launch, patched = executor.__call__, set()

    def patch_once(function):
        if function not in patched:
            patched.add(function)
            return patch(function)

    def forget_then_launch(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, executor.__call__ = patch_once, forget_then_launch
    yield
    interpreter._patch_lang, executor.__call__ = patch, launch
