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


@pytest.fixture(scope="session", autouse=True)
def remember_types(patch_each_function_once_per_launch):
    """A fifth less again: of each result the interpreter works out the type anew, and NumPy's type, and the shape.

    A type does not change, so what was worked out is kept: NumPy's by name, the others with the type of the same shape.
    Where Triton is built otherwise, nothing is changed.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    block, made = tl.block_type, tl.tensor.__init__
    numpy_type, of_element = getattr(interpreter, "_get_np_dtype", None), getattr(block, "with_element_ty", None)
    if numpy_type is None or of_element is None or made.__code__.co_varnames[:3] != ("self", "handle", "type"):
        yield
        return
    known: dict = {}

    def known_numpy_type(kind):
        element = kind.scalar
        if element.is_ptr():
            return numpy_type(kind)
        if element.name not in known:
            known[element.name] = numpy_type(kind)
        return known[element.name]

    def kept_of_element(self, element):
        kept = self.__dict__.setdefault("_of_element", {})
        if id(element) not in kept:
            kept[id(element)] = of_element(self, element)  # which holds the element: its id stays its own
        return kept[id(element)]

    def make(self, handle, type):
        kept = type.__dict__.get("_shape_of_values")
        if kept is None:
            made(self, handle, type)
            type._shape_of_values = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = kept

    interpreter._get_np_dtype, block.with_element_ty, tl.tensor.__init__ = known_numpy_type, kept_of_element, make
    yield
    interpreter._get_np_dtype, block.with_element_ty, tl.tensor.__init__ = numpy_type, of_element, made
