"""Ahead-of-time compilation: one small file per (kernel variant, compute capability), without a GPU.

A file holds text lines, an empty line, and the cubin. The lines say everything a launcher needs:

    gqa-cubin 1
    kernel decode                      which of append, prefill, decode, combine, score, select, long_prefill
    name decode_kernel                 the function's name in the module
    capability 90                      runs on this capability; from 90 on, on this one only
    shared_bytes 104448                dynamic shared memory (above 48 KiB: raise the function's limit first)
    threads 128                        block size: (threads, 1, 1)
    tile_rows 16                       with steps, splits, heads: the grid (docs/kernels.md)
    argument query_ptr *bf16           one line per argument, in order; pointers aligned to 16 bytes
    argument kv_heads i32
    scratch_pointers 2                 that many null pointers follow the arguments (Triton's hidden parameters)
    constant GROUP 4                   what was compiled in: a launcher compares these with its layer
    code_sha256 ...
    code_bytes 21336

Line information is off: it would carry paths of the machine that compiled. Needs Triton, not interpreting.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, field
from multiprocessing import get_context
from typing import Any

from gqa_plugins.grouped_attention import plan
from gqa_plugins.grouped_attention.ptx_parameters import SCRATCH_POINTERS, scratch_pointers
from gqa_plugins.grouped_attention.recipes import recipe

from gqa_export.errors import GqaExportError
from gqa_export.long_attention_op import LongSetting

MAGIC = "gqa-cubin 1"
SUFFIX = ".gqacubin"


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for. Fields that a kernel does not use are left at their defaults.

    rows: S * (H / K) that decides the row tile: the group size for decode steps, anything >= 128 for prefill. ahead: of
    prefill, that it works ahead where `plan.works_ahead`. ring: over rings. cache: of codes, a name of
    `attention_op.CACHE_CODES`; "" where it holds numbers. long, projections: for long prompts.
    """

    kernel: str
    dtype: str
    group: int
    head: int
    value_head: int
    rows: int = 0
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    rotary_half: int = 0
    interleaved: bool = False
    has_new: bool = True
    ahead: bool = True
    ring: bool = False
    cache: str = ""
    long: LongSetting | None = None
    projections: int = 0

    @property
    def name(self) -> str:
        """A name for people and files, unique among variants."""
        flags = [word for word, on in (("window", self.window), ("softcap", self.softcap), ("sinks", self.sinks),
                                       (f"rotary{2 * self.rotary_half}", self.rotary_half > 0),
                                       ("interleaved", self.interleaved), ("readonly", not self.has_new),
                                       ("in-turn", not self.ahead), ("ring", self.ring),
                                       (f"{self.cache}-cache", bool(self.cache))) if on]
        if self.long is not None:
            flags.append("-".join(map(str, (*astuple(self.long), self.projections))))
        rows = [f"r{self.rows}"] if self.rows else []
        shape = [f"g{self.group}", f"d{self.head}", f"e{self.value_head}"]
        return "-".join([self.kernel, self.dtype, *shape, *rows, *flags])


@dataclass(frozen=True)
class Cubin:
    """A compiled variant: the facts that its file's lines state, and the code."""

    kernel: str
    name: str
    capability: int
    shared_bytes: int
    threads: int
    tile_rows: int
    arguments: tuple[tuple[str, str], ...]
    constants: dict[str, str]
    code: bytes = field(repr=False)
    scratch_pointers: int = SCRATCH_POINTERS

    def to_bytes(self) -> bytes:
        lines = [MAGIC, f"kernel {self.kernel}", f"name {self.name}", f"capability {self.capability}",
                 f"shared_bytes {self.shared_bytes}", f"threads {self.threads}", f"tile_rows {self.tile_rows}",
                 *(f"argument {name} {kind}" for name, kind in self.arguments),
                 f"scratch_pointers {self.scratch_pointers}",
                 *(f"constant {name} {value}" for name, value in self.constants.items()),
                 f"code_sha256 {hashlib.sha256(self.code).hexdigest()}", f"code_bytes {len(self.code)}"]
        return ("\n".join(lines) + "\n\n").encode("ascii") + self.code

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "cubin") -> Cubin:
        """Read `to_bytes` back. Raises GqaExportError for a file that is not one, is cut short, or was altered."""
        head, separator, code = data.partition(b"\n\n")
        lines = head.decode("ascii", errors="replace").split("\n")
        fix = "compile it again: python -m gqa_plugins.grouped_attention.cubin --help"
        if lines[0] != MAGIC or not separator:
            raise GqaExportError(f"not a kernel file of this version: it does not begin with '{MAGIC}'", where, fix,
                                 code="E-ENGINE-KERNEL-FILE")
        facts: dict[str, str] = {}
        arguments, constants = [], {}
        for line in lines[1:]:
            key, _, rest = line.partition(" ")
            if key == "argument":
                name, _, kind = rest.partition(" ")
                arguments.append((name, kind))
            elif key == "constant":
                name, _, value = rest.partition(" ")
                constants[name] = value
            else:
                facts[key] = rest
        try:
            if len(code) != int(facts["code_bytes"]) or hashlib.sha256(code).hexdigest() != facts["code_sha256"]:
                raise GqaExportError("the kernel file is cut short or altered: its code does not match its sha256",
                                     where, fix, code="E-ENGINE-KERNEL-FILE")
            return cls(facts["kernel"], facts["name"], int(facts["capability"]), int(facts["shared_bytes"]),
                       int(facts["threads"]), int(facts["tile_rows"]), tuple(arguments), constants, code,
                       int(facts["scratch_pointers"]))
        except (KeyError, ValueError) as error:
            raise GqaExportError(f"the kernel file's lines are incomplete: {error}", where, fix,
                                 code="E-ENGINE-KERNEL-FILE") from error


def model_variants(*, heads: int, kv_heads: int, head: int, dtype: str, value_head: int | None = None,
                   windows: Iterable[bool] = (False,), softcap: bool = False, sinks: bool = False,
                   rotary_size: int = 0, interleaved: bool = False, cache: str = "") -> list[Variant]:
    """Every variant that a model's layers launch: append, decode and prefill (per kind of window), combine. cache: of
    codes, "" for numbers.

    Decode is compiled for one new token per step, prefill for long prompts; both serve any number of new tokens.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise GqaExportError(f"{heads} query heads cannot be grouped over {kv_heads} key/value heads", "--heads",
                             "heads must be a multiple of kv-heads", code="E-OPTION-HEADS")
    if dtype not in plan.DTYPE_BYTES:
        raise GqaExportError(f"dtype {dtype!r} is unknown", "--dtype", code="E-OPTION-DTYPE",
                             fix=f"use one of {', '.join(plan.DTYPE_BYTES)}")
    value_size = head if value_head is None else value_head
    for flag, size in (("--head-size", head), ("--value-head-size", value_size)):
        if not 1 <= size <= 256:
            raise GqaExportError(f"head size {size} is outside 1 .. 256", flag, "use less", code="E-OPTION-HEAD-SIZE")
    if rotary_size % 2 or not 0 <= rotary_size <= head:
        raise GqaExportError(f"rotary size {rotary_size} does not fit head size {head}", "--rotary-size",
                             "use an even size up to the head size, 0 for none", code="E-OPTION-ROTARY-SIZE")
    group = heads // kv_heads
    variants = [Variant("append", dtype, group, head, value_size, rotary_half=rotary_size // 2,
                        interleaved=interleaved and rotary_size > 0, cache=cache)]
    for window in sorted(set(windows)):
        variants.append(Variant("decode", dtype, group, head, value_size, group, window, softcap, cache=cache))
        variants.append(Variant("prefill", dtype, group, head, value_size, plan.LONG_ROWS, window, softcap, sinks,
                                cache=cache))
    variants.append(Variant("combine", dtype, group, head, value_size, sinks=sinks, cache=cache))
    return variants


def compile_variant(variant: Variant, capability: int) -> Cubin:
    """Compile one variant for one capability (80, 86, ... 121). No GPU or driver is needed. Raises GqaExportError."""
    return compile_to_ptx(variant, capability)[0]


def compile_to_ptx(variant: Variant, capability: int) -> tuple[Cubin, str]:
    """The same, and the PTX text that the code was assembled from."""
    if capability not in plan.CAPABILITIES:
        raise GqaExportError(f"compute capability {capability} is not supported", "--capability",
                             f"use one of {', '.join(map(str, plan.CAPABILITIES))}", code="E-OPTION-CAPABILITY")
    if variant.cache == "fp8" and capability < plan.FP8_CAPABILITY:
        raise GqaExportError(f"a cache of fp8 codes needs compute capability 8.9, and {capability // 10}."
                             f"{capability % 10} does not convert them", "--compute-capability",
                             "leave this capability out, or export with --kv-cache int8", code="E-ENGINE-KERNEL-FP8")
    try:
        import triton
    except ImportError as error:
        raise GqaExportError("Triton is not installed", "gqa_plugins.grouped_attention.cubin",
                             "pip install 'gqa-export[plugins]'", code="E-ENV-TRITON") from error
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if plan.interpreting():
        raise GqaExportError("kernels cannot be compiled in a process that interprets them",
                             "environment variable TRITON_INTERPRET", "unset it and start again",
                             code="E-ENV-TRITON-INTERPRET")
    made_as = recipe(variant, capability)
    held = plan.CACHE_KINDS[variant.cache] if variant.cache else variant.dtype
    kinds = {name: kind.replace("T", variant.dtype).replace("C", held) for name, kind in made_as.arguments}
    signature = {name: kinds.get(name, "constexpr") for name in made_as.kernel.arg_names}
    absent = {name: None for name in signature if name not in kinds and name not in made_as.constants}
    aligned = {(index,): [["tt.divisibility", 16]] for index, kind in enumerate(kinds.values()) if kind[0] == "*"}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(ASTSource(made_as.kernel, signature, {**absent, **made_as.constants}, aligned),
                                  target=GPUTarget("cuda", capability, 32), options=made_as.options)
    facts = compiled.metadata
    if facts.global_scratch_size or facts.profile_scratch_size or facts.shared > plan.SHARED_KIB[capability] * 1024:
        raise GqaExportError(
            f"{variant.name} for {capability} needs {facts.shared} bytes of shared memory and "
            f"{facts.global_scratch_size} of scratch; the launcher gives {plan.SHARED_KIB[capability] * 1024} and none",
            "gqa_plugins.grouped_attention.plan.choose_tiles", "report it: the tile table is wrong for this shape",
                             code="E-ENGINE-KERNEL-SHARED")
    ptx = compiled.asm["ptx"]
    constants = {name: _text(value) for name, value in made_as.constants.items()}
    made = Cubin(variant.kernel, facts.name, capability, facts.shared, made_as.warps * 32, made_as.tile_rows,
                 tuple(kinds.items()), constants, compiled.asm["cubin"],
                 scratch_pointers(ptx, tuple(kinds.values()), f"kernel {variant.name} for {capability}"))
    return made, ptx


def _text(constant: Any) -> str:
    return str(int(constant) if isinstance(constant, bool) else constant)


def _compile_job(job: tuple[Variant, int]) -> bytes:
    return compile_variant(*job).to_bytes()


def build(variants: Sequence[Variant], capabilities: Sequence[int], jobs: int = 1) -> dict[tuple[Variant, int], bytes]:
    """Compile every variant for every capability, `jobs` at a time, each in a process of its own if more than one."""
    work = [(variant, capability) for variant in variants for capability in capabilities]
    if jobs <= 1:
        return {job: _compile_job(job) for job in work}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return dict(zip(work, pool.map(_compile_job, work), strict=True))


def parse_capability(text: str) -> int:
    """'8.9', '89' or 'sm_89' to 89. Raises GqaExportError for one that the kernels are not compiled for."""
    digits = text.lower().removeprefix("sm_").replace(".", "")
    if not digits.isdigit() or int(digits) not in plan.CAPABILITIES:
        raise GqaExportError(f"compute capability {text!r} is not supported", "--capability",
                             f"use one of {', '.join(f'{c // 10}.{c % 10}' for c in plan.CAPABILITIES)}",
                             code="E-OPTION-CAPABILITY")
    return int(digits)


if __name__ == "__main__":
    from gqa_plugins.grouped_attention.cubin_command import main

    sys.exit(main())
