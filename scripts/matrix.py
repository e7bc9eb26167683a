"""Every causal-LM architecture that the installed transformers knows: exported, validated, written down.

    python scripts/matrix.py --resume            # all that are missing, then models/matrix.json and docs/models.md
    python scripts/matrix.py --stale             # all whose row another version or configuration made
    python scripts/matrix.py --only llama,gemma3_text --work DIR

One process imports everything once; each architecture then runs in a fork of it with a time limit, so that whatever
happens there (a crash too) is a row. Rows are written as they come, so a killed run is resumed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "models" / "matrix.json"


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--resume", action="store_true", help="only names that were not checked yet")
    parser.add_argument("--stale", action="store_true", help="only names whose row was made with other versions, or "
                        "with another small configuration, than it would be now; a killed run goes on when repeated")
    parser.add_argument("--failed", action="store_true", help="only names whose row is `wrong` or `failed`")
    parser.add_argument("--data", type=Path, default=DATA, help="the JSON file to write into")
    parser.add_argument("--keep", type=Path, default=None, help="keep the small checkpoints here")
    parser.add_argument("--limit", type=int, default=300, help="seconds of CPU time for one architecture")
    parser.add_argument("--no-depth", action="store_true", help="do not prove depth")
    parser.add_argument("--prove", action="store_true", help="only prove the depth of supported rows that lack it")
    parser.add_argument("--caches", default="growing,static", help="caches to check, separated by commas")
    parser.add_argument("--docs", action="store_true", help="only write docs/models.md from the data")
    parser.add_argument("--part", default="", help="k/n: every n-th name from k, to share the work")
    arguments = parser.parse_args()
    if arguments.docs:
        write_document()
        return
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
                      TRANSFORMERS_VERBOSITY="error")
    from gqa_export.describe.architectures import known_names, versions

    warm()
    gc.collect()
    gc.freeze()  # what was imported stays: no fork looks through it again
    gc.set_threshold(200_000, 50, 100)

    table = json.loads(arguments.data.read_text()) if arguments.data.exists() else {"rows": {}}
    names = list(known_names())
    if arguments.only:
        names = arguments.only.split(",")
    if arguments.resume:
        names = [name for name in names if table["rows"].get(name, {}).get("verdict", "unchecked") == "unchecked"]
    if arguments.stale:
        names = [name for name in names if stale(name, table, versions())]
    if arguments.failed:
        names = [name for name in names if table["rows"].get(name, {}).get("verdict") in ("wrong", "failed")]
    if arguments.prove:
        names = [name for name in names if table["rows"][name]["verdict"] == "supported"
                 and not table["rows"][name].get("depth")]
    if arguments.part:
        part, parts = map(int, arguments.part.split("/"))
        names = names[part::parts]
    began = time.perf_counter()
    for number, name in enumerate(names, 1):
        row = in_a_fork(name, known_names()[name], arguments, table["rows"].get(name, {}))
        table = json.loads(arguments.data.read_text()) if arguments.data.exists() else {"rows": {}}
        table["rows"][name] = {**row, **drawing(name)}
        table["rows"] = dict(sorted(table["rows"].items()))
        date_rows(table, name, versions())
        temporary = arguments.data.with_suffix(".part")
        temporary.write_text(json.dumps(table, indent=1) + "\n")
        temporary.replace(arguments.data)
        print(f"{number}/{len(names)} {time.perf_counter() - began:.0f}s {name}: {row['verdict']} "
              f"{row.get('reason', '')[:230]} ({row.get('seconds', 0)}s)", flush=True)
    if arguments.data == DATA:
        write_document()


def stale(name: str, table: dict, here: dict) -> bool:
    """Whether the row of a name was not made by these versions with the small configuration of now."""
    row = table["rows"].get(name)
    return row is None or row.get("made_with", table.get("versions")) != here or row.get("drawn") != drawing(name).get(
        "drawn")


def drawing(name: str) -> dict:
    """What a row holds of its small configuration: its digest, and the numbers of it that go into arithmetic."""
    from gqa_models.shrink import drawn, scalars, small_config

    found: dict = {}
    try:
        config = small_config(name)
        found["drawn"] = drawn(config)
        found["scalars"] = scalars(config)
    except Exception:  # a configuration that transformers refuses, or that has several decoders: its row names why
        return found
    return found


def date_rows(table: dict, name: str, here: dict) -> None:
    """Write down which versions made row `name`: those of the table, or, where most rows are of others, its own."""
    table.setdefault("versions", here)
    table.setdefault("date", datetime.date.today().isoformat())
    rows = table["rows"].values()
    if here != table["versions"]:
        table["rows"][name]["made_with"] = here
    if all(row.get("made_with", table["versions"]) == here for row in rows):
        table["versions"], table["date"] = here, datetime.date.today().isoformat()
        for row in rows:
            row.pop("made_with", None)


def write_document() -> None:
    """docs/models.md, from the data."""
    from gqa_export.describe.architectures import document, table

    (ROOT / "docs" / "models.md").write_text(document(table()))


def warm() -> None:
    """Export and validate one model, so that a fork finds everything imported, and the tracer's own caches filled."""
    import warnings

    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gqa-matrix-") as folder:
        row = row_of("llama", "LlamaForCausalLM", ("growing",), Path(folder), depth=False)
    if row["verdict"] != "supported":
        sys.exit(f"the plainest architecture does not pass: {row}")


def in_a_fork(name: str, architecture: str, arguments: argparse.Namespace, known: dict) -> dict:
    """The row of one architecture, made in a child that may die or hang."""
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (arguments.limit, arguments.limit))
        folder = arguments.keep or Path(tempfile.mkdtemp(prefix="gqa-matrix-"))
        caches = tuple(arguments.caches.split(","))
        with os.fdopen(write, "w") as out:
            row = proved(known, name, folder) if arguments.prove else \
                row_of(name, architecture, caches, folder, depth=not arguments.no_depth)
            json.dump(row, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        text = answers.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
    return {"name": name, "architecture": architecture, "verdict": "failed",
            "reason": f"the process ended without an answer ({how}, limit {arguments.limit} s)"}


def row_of(name: str, architecture: str, caches: tuple[str, ...], folder: Path, *, depth: bool) -> dict:
    """Write a small checkpoint into a subfolder of `folder` and check it."""
    from evidence.architecture_check import check
    from gqa_models.shrink import write_small

    try:
        checkpoint = write_small(name, folder / name)
    except Exception as error:
        refusal = refused_by_config(name, folder / name)
        if refusal:
            return {"name": name, "architecture": architecture, "verdict": "refused", "reason": refusal}
        what = (str(error).strip().splitlines() or [""])[0][:300]
        return {"name": name, "architecture": architecture, "verdict": "failed",
                "reason": f"no small model: {type(error).__name__}: {what}"}
    return check(name, architecture, checkpoint, caches=caches, depth=depth).to_dict()


def refused_by_config(name: str, folder: Path) -> str:
    """Why a model is refused that cannot even be built here; "" if it is not."""
    import torch
    from gqa_models.shrink import small_config

    from gqa_export.checkpoint.refusals import refuse_config
    from gqa_export.errors import GqaExportError
    from gqa_export.trace import skeleton

    try:
        config = small_config(name)
        config.save_pretrained(folder)
        refuse_config(config, "the checkpoint", text_only=True)
        skeleton.build(config, torch.float32, device="meta")
    except GqaExportError as refusal:
        return f"{refusal.what} [{refusal.where}]"
    except Exception:
        return ""
    return ""


def proved(known: dict, name: str, folder: Path) -> dict:
    """A row with its depth proved."""
    from evidence.architecture_check import add_depth
    from gqa_models.shrink import write_small

    return add_depth(known, write_small(name, folder / name))


if __name__ == "__main__":
    main()
