"""The graph after each pass, as files to look at: 000-traced.onnx, 001-infer_shapes.onnx, ..., and passes.json.

The files hold no weights' bytes: a weight stays a reference, `weights:NAME` in place of a file. They are written while
the passes run, so that those of a lowering that fails are there up to the pass that failed. Looking changes nothing:
the exported graph is the same with and without.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.staging import check_folder, disk_errors
from ..files.write_text import write_text
from ..graph.passes import PassRun

if TYPE_CHECKING:
    import onnx

PASSES = "passes.json"
_OURS = re.compile(r"[0-9]{3}-[a-z_]+\.onnx")


class PassDump:
    """A folder that gets the graph after each pass."""

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        """Make the folder ready; nothing is written if it cannot be used.

        Args:
            folder: made if it does not exist.
            force: replace the files of an earlier dump that is there.

        Raises:
            GqaExportError: the folder is not empty (with `force`: and does not hold a dump), or cannot be written.
        """
        self.folder = Path(os.path.abspath(folder))
        self._rows: list[dict[str, Any]] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        check_folder(self.folder, force=force, marker=PASSES)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in list(self.folder.iterdir()):
                if path.name == PASSES or _OURS.fullmatch(path.name):
                    path.unlink()

    def start(self, model: onnx.ModelProto) -> None:
        """Write the canonical model, before any pass."""
        import onnx

        self._weights = {tensor.name: tensor for tensor in model.graph.initializer
                         if tensor.data_location == onnx.TensorProto.EXTERNAL}
        self._write("traced", model, {})

    def add(self, run: PassRun, graph: object) -> None:
        """Write the graph after a pass. graph: an onnx ModelProto, an onnx_ir Model or a graphsurgeon Graph."""
        self._write(run.name, self._as_model(graph), {
            "count": run.count, "expected": run.expected,
            "near_misses": [{"node": miss.node, "reason": miss.reason} for miss in run.near_misses]})

    def _as_model(self, graph: object) -> onnx.ModelProto:
        import onnx
        import onnx_graphsurgeon as gs

        from ..graph import edit

        if isinstance(graph, gs.Graph):
            return edit.snapshot(graph)
        model = onnx.ModelProto()
        if isinstance(graph, onnx.ModelProto):
            model.CopyFrom(graph)
        else:
            from onnx_ir import serde

            model.CopyFrom(serde.serialize_model(graph))  # type: ignore[arg-type]
        inputs = [value for value in model.graph.input if value.name not in self._weights]
        model.graph.initializer.extend(self._weights[value.name] for value in model.graph.input
                                       if value.name in self._weights)
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        return model

    def _write(self, name: str, model: onnx.ModelProto, facts: dict[str, Any]) -> None:
        file = f"{len(self._rows):03}-{name}.onnx"
        self._rows.append({"file": file, "pass": name, "nodes": len(model.graph.node), **facts})
        rows = ",\n".join(json.dumps(row) for row in self._rows)
        with disk_errors(self.folder):
            (self.folder / file).write_bytes(model.SerializeToString())
        write_text(self.folder / PASSES, f"[\n{rows}\n]\n")
