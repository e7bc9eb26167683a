"""A model repository for Triton Inference Server around an engine bundle.

    REPOSITORY/NAME/config.pbtxt        one request is one prompt; tokens stream back one by one
    REPOSITORY/NAME/1/model.py          Triton's Python backend: `gqa_export.integrations.triton_backend`
    REPOSITORY/NAME/1/engine/           the engine bundle, hard links where they are possible

model.py names a module of the gqa-export that wrote it: a repository that an earlier version wrote names
`gqa_export.serving`, which is gone, and is written again with `gqa-export trt ... --triton-repository`.
The Python backend, because its session keeps lengths, samples and streams. Triton's own TensorRT backend returns logits
and leaves lengths to the client; that past and present must be the same memory it can do (implicit state with
`use_same_buffer_for_input_output`).
Source: triton-inference-server/python_backend README (decoupled mode, TritonPythonModel), common's
protobuf/model_config.proto.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from .. import __version__
from ..bundle.manifest import MANIFEST, read_manifest
from ..errors import GqaExportError
from ..files.staging import writing_folder

VERSION = "1"
INPUTS = (("input_ids", "TYPE_INT32", "-1", False), ("max_new_tokens", "TYPE_INT32", "1", True),
          ("temperature", "TYPE_FP32", "1", True), ("seed", "TYPE_INT64", "1", True))
OUTPUTS = (("token", "TYPE_INT32", "1"),)
MODEL = '''"""Made by gqa-export {version}: the engine bundle beside this file, run by its Triton backend.

After another gqa-export is installed, write the repository again: gqa-export trt ... --triton-repository.
"""

from gqa_export.integrations.triton_backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def check_repository(repository: Path, name: str) -> None:
    """Refuse, before any work, a model name that Triton cannot have or a place that is taken by something else."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise GqaExportError(f"Triton does not accept {name!r} as the name of a model", "--triton-repository",
                             "give the engine bundle (-o) a name of letters, digits, - and _",
                             code="E-OPTION-TRITON-NAME")
    model = repository / name
    if model.exists() and not (model / VERSION / "engine" / MANIFEST).is_file():
        raise GqaExportError("the repository has another model of that name", str(model),
                             "choose another folder with --triton-repository, or another name with -o",
                             code="E-FILE-TRITON-MODEL")


def write_repository(repository: Path, bundle: Path) -> Path:
    """Write the model of an engine bundle, named as its folder; an earlier one that we wrote is replaced at once: a
    server that looks always finds a whole model, the old or the new one."""
    name = bundle.absolute().name
    check_repository(repository, name)
    facts = read_manifest(bundle).engine
    if facts is None:
        raise GqaExportError("Triton can serve an engine bundle only", str(bundle), "build one with `gqa-export trt`",
                             code="E-OPTION-TRITON-ENGINE")
    model = repository / name
    with writing_folder(model, force=True, marker=f"{VERSION}/engine/{MANIFEST}") as staging:
        (staging / VERSION).mkdir()
        shutil.copytree(bundle, staging / VERSION / "engine", copy_function=_link)
        (staging / VERSION / "model.py").write_text(MODEL.format(version=__version__), encoding="utf-8")
        (staging / "config.pbtxt").write_text(config(name), encoding="utf-8")
    return model


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def config(name: str) -> str:
    """config.pbtxt: decoupled, one prompt a request, one instance (the cache is its own)."""
    inputs = ",\n".join(f'  {{ name: "{tensor}" data_type: {kind} dims: [ {size} ]'
                        f'{" optional: true" if optional else ""} }}' for tensor, kind, size, optional in INPUTS)
    outputs = ",\n".join(f'  {{ name: "{tensor}" data_type: {kind} dims: [ {size} ] }}'
                         for tensor, kind, size in OUTPUTS)
    return (f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\n'
            "model_transaction_policy { decoupled: true }\n"
            f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"
            "instance_group [ { count: 1 kind: KIND_GPU } ]\n")
