"""A compiled kernel's parameters, counted in its PTX: the declared arguments, then pointers that Triton adds.

Launchers pass the hidden ones as null. A Triton that adds another is refused when it compiles, not found at a launch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gqa_export.errors import GqaExportError

SCRATCH_POINTERS = 2  # the hidden parameters of Triton 3.5 to 3.9: scratch of the kernel and of the profiler
PTX_KINDS = {"*": ("u64", "b64"), "i32": ("u32", "s32", "b32"), "fp32": ("f32", "b32")}


def scratch_pointers(ptx: str, kinds: Sequence[str], where: str) -> int:
    """How many hidden pointers follow a compiled kernel's declared arguments, which launchers pass as null.

    Args:
        ptx: the kernel as PTX text.
        kinds: types of the declared arguments, in order ("*bf16", "i32", "fp32").
        where: the kernel, for the message.

    Raises:
        GqaExportError: the compiled kernel takes other arguments than declared, or hidden ones that are not known.
    """
    found = re.findall(r"\.param\s+\.(\w+)", ptx.partition(".reqntid")[0])
    declared = [PTX_KINDS["*" if kind[0] == "*" else kind] for kind in kinds]
    hidden = found[len(declared):]
    fits = len(found) >= len(declared) and all(kind in allowed for kind, allowed in zip(found, declared))
    if not fits or len(hidden) > SCRATCH_POINTERS or any(kind not in PTX_KINDS["*"] for kind in hidden):
        raise GqaExportError(
            f"the compiled kernel takes {', '.join(found) or 'nothing'}; expected {', '.join(kinds)} and at most "
            f"{SCRATCH_POINTERS} hidden pointers", where, "install the Triton that constraints.txt names",
            code="E-ENGINE-KERNEL-ARGUMENTS")
    return len(hidden)
