"""The pass over the text that fits a whole model layer by layer; see `layer_fit` for one layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.in_float import in_float
from ..checkpoint.load_model import load_model
from ..checkpoint.tokenized_text import load_tokenizer, packed, read_beginning, spread, tokenize
from ..files.staging import writing_folder
from ..progress import Progress
from ..trace import attention_hook, skeleton
from .assemble import assemble, changed
from .checkpoint_writer import Stored, write_checkpoint
from .heads import LayerHeads
from .layer_fit import LayerFit, empty_like
from .pooling import Pooled
from .structure import Structure, with_kv_heads
from .weight_error import LayerError

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

LENGTH = 512


def calibration_rows(checkpoint: Checkpoint, config: Any, text: Path, tokens: int) -> torch.Tensor:
    """Rows of token ids [B, S] spread over the text, at most `tokens` in all."""
    ids = tokenize(load_tokenizer(checkpoint.folder), read_beginning(text).text)
    length = min(LENGTH, int(getattr(config, "max_position_embeddings", 0) or LENGTH), tokens, max(len(ids), 1))
    return torch.from_numpy(spread(packed(ids, length, str(text)), max(tokens // length, 1)).astype("int64"))


class Calibration:
    """One source model and one text, for any number of key/value heads."""

    def __init__(self, checkpoint: Checkpoint, stored: Stored, source: Structure, rows: torch.Tensor,
                 grouping: str, report: Progress) -> None:
        from ..trace.probe.layer_probe import probe

        self.checkpoint, self.stored, self.source = checkpoint, stored, source
        self.rows, self.grouping, self.report = rows, grouping, report
        self.visible = [layer.visible for layer in probe(source.config).layers]

    def run(self, kv_heads: Sequence[int], keep: Callable[[int, dict[str, torch.Tensor]], None],
            ) -> tuple[list[LayerError], list[Pooled]]:
        """Fit every layer; `keep` is given the tensors of each that change."""
        target, _ = with_kv_heads(self.source, kv_heads)
        model = load_model(self.checkpoint, "auto", attn_implementation=attention_hook.register())
        meta_model = skeleton.build(target.config, torch.float32, device="meta", attention=attention_hook.NAME)
        errors: list[LayerError] = []
        groups: list[Pooled] = []
        for index, layout in enumerate(self.source.layers):
            module: Any = model.get_submodule(layout.path)
            fit = LayerFit(LayerHeads(layout, self.stored.read), target.layers[index], module, self.visible[index])
            module.forward = self._patched(fit, meta_model.get_submodule(layout.path), module.forward,
                                           kv_heads[index], errors, groups, keep)
        both = torch.cat((self.rows, self.rows))
        positions = torch.arange(both.shape[1])[None]
        with torch.no_grad(), in_float(model):
            model.base_model(input_ids=both, attention_mask=torch.ones_like(both), position_ids=positions,  # type: ignore[operator]
                             use_cache=False)
        return errors, groups

    def _patched(self, fit: LayerFit, meta_module: torch.nn.Module, forward: Callable[..., Any], kv_heads: int,
                 errors: list[LayerError], groups: list[Pooled],
                 keep: Callable[[int, dict[str, torch.Tensor]], None]) -> Callable[..., Any]:
        batch = len(self.rows)

        def half(values: Any, which: int) -> Any:
            if isinstance(values, torch.Tensor) and values.ndim > 1 and len(values) == 2 * batch:
                return values[which * batch: (which + 1) * batch]
            if isinstance(values, tuple):
                return tuple(half(value, which) for value in values)
            return values

        def replaced(*given: Any, **named: Any) -> Any:
            layer = len(errors)
            self.report(f"fitting layer {layer}", layer, len(self.source.layers))
            first, second = ((half(given, which), {name: half(value, which) for name, value in named.items()})
                             for which in (0, 1))
            result, metric = fit.source(lambda module: forward(*first[0], **first[1]))
            wanted = result[0] if isinstance(result, tuple) else result
            pooled = fit.pooled(metric, kv_heads, self.grouping)
            made = empty_like(meta_module, fit.module)
            answer, pooled = fit.converted(made, pooled, lambda module: module(*second[0], **second[1]), wanted)
            got = answer[0] if isinstance(answer, tuple) else answer
            errors.append(fit.errors(pooled, wanted, got))
            groups.append(pooled)
            keep(layer, assemble(fit.heads, fit.target, pooled))
            fit.heads.forget()
            both = torch.cat((wanted, got))
            return (both, *result[1:]) if isinstance(result, tuple) else both

        return replaced


def write_calibrated(calibration: Calibration, output: Path, kv_heads: Sequence[int], force: bool, marker: str,
                     finish: Callable[[Path, list[LayerError], list[Pooled]], None]) -> None:
    """Fit and write: layers wait in files of their own beside the shards, so that few are in memory."""
    from safetensors.torch import load_file, save_file

    target, fields = with_kv_heads(calibration.source, kv_heads)
    owner = {name: index for index, layer in enumerate(calibration.source.layers) for name in changed(layer, False)}
    with writing_folder(output, force=force, marker=marker) as folder:
        waiting = folder / ".layers"
        waiting.mkdir()
        errors, groups = calibration.run(
            kv_heads, lambda layer, tensors: save_file({name: value.contiguous() for name, value in tensors.items()},
                                                       waiting / f"{layer}.safetensors"))
        in_memory: dict[int, dict[str, torch.Tensor]] = {}

        def make(name: str) -> torch.Tensor:
            layer = owner[name]
            if layer not in in_memory:
                in_memory.clear()
                in_memory[layer] = load_file(waiting / f"{layer}.safetensors")
            found = in_memory[layer].get(name)
            return calibration.stored.read(name) if found is None else found

        write_checkpoint(folder, calibration.stored, {name: target.shapes[name] for name in owner}, make, fields,
                         calibration.report)
        in_memory.clear()  # its tensors map those files, and Windows removes none that is mapped
        shutil.rmtree(waiting)
        finish(folder, errors, groups)
