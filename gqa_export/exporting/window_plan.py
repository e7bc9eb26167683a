"""Which layers of an export keep a ring of slots in place of the whole capacity (`--window-cache small`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import GqaExportError, UnsupportedModel
from ..spec import Fallback, WindowCache
from ..target_refusals import refuse_windows

if TYPE_CHECKING:
    from ..spec import ModelSpec
    from ..targets import Target
    from .options import ExportOptions

PROMPT_CHUNK = 512
"""new tokens of a sequence in one call, unless told otherwise"""


@dataclass(frozen=True)
class WindowPlan:
    """What becomes of the option. windows: the rings; None: all layers keep the whole capacity. fallbacks: layers that
    would have one if the target had it. notes: what a user should know."""

    windows: WindowCache | None = None
    fallbacks: tuple[Fallback, ...] = ()
    notes: tuple[str, ...] = ()


def check_window_options(options: ExportOptions, target: Target) -> None:
    """Refuse what cannot be had together, before the work. options: resolved.

    Raises:
        GqaExportError: names the option that does not fit.
    """
    if options.window_cache not in ("full", "small"):
        raise GqaExportError(f"--window-cache is {options.window_cache!r}, expected full or small", "--window-cache",
                             "use --window-cache small or full", code="E-OPTION-WINDOW-CACHE")
    if options.window_cache == "full":
        if options.prompt_chunk:
            raise GqaExportError("--prompt-chunk belongs to --window-cache small: other caches take prompts of any "
                                 "length", "--prompt-chunk", "leave it out, or add --window-cache small",
                                 code="E-OPTION-WINDOW-CACHE")
        return
    refuse_windows(target)
    wrong = [(name, fix) for given, name, fix in (
        (options.cache != "static", f"--cache {options.cache}", "use --cache static: a ring is written in place"),
        (options.kv_cache, f"--kv-cache {options.kv_cache}", "leave one of the two out"),
        (options.long, "--long-attention", "leave one of the two out"),
        (options.tensor_parallel > 1, f"--tensor-parallel {options.tensor_parallel}", "leave one of the two out"),
    ) if given]
    if wrong:
        raise GqaExportError(f"--window-cache small is not supported together with {wrong[0][0]}", "--window-cache",
                             wrong[0][1], code="E-OPTION-WINDOW-CACHE")


def window_plan(options: ExportOptions, target: Target, spec: ModelSpec, capacity: int) -> WindowPlan:
    """What `--window-cache small` comes to for a model.

    Args:
        options: checked by `check_window_options`.
        target: of the export.
        spec: the model.
        capacity: tokens of a cache that keeps all.

    Raises:
        UnsupportedModel: its prompts must not be cut (longrope).
    """
    if options.window_cache == "full":
        return WindowPlan()
    chunk = options.prompt_chunk or PROMPT_CHUNK
    windows = WindowCache.of(spec.layers, capacity, chunk)
    if windows is None:
        narrowest = min((layer.window for layer in spec.layers if layer.window > 0), default=0)
        why = (f"the narrowest window of {narrowest} tokens and a prompt chunk of {chunk} are no less than the "
               f"capacity of {capacity}" if narrowest else "no layer has a window")
        return WindowPlan(notes=(f"--window-cache small changes nothing: {why}",))
    if spec.rope_switch:
        raise UnsupportedModel("--window-cache small feeds long prompts in pieces, and a longrope model takes one of "
                               f"more than {spec.rope_switch} tokens at once", "--window-cache",
                               f"leave it out, or use --capacity {spec.rope_switch} or less",
                               code="E-MODEL-WINDOW-ROPE")
    if target.windows_instead:
        return WindowPlan(fallbacks=tuple(
            Fallback(layer.layer, f"a cache of {windows.slots(layer)} slots", f"a cache of {capacity} tokens",
                     target.windows_instead) for layer in spec.owners if windows.slots(layer)))
    return WindowPlan(windows)
