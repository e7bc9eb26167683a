"""`gqa-export models`: the architectures that were exported and compared with PyTorch, and those that are refused."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command(short_help="List the architectures that were checked, and why others are refused.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole table as JSON.")
@click.argument("name", required=False)
def command(as_json: bool, name: str | None) -> None:
    """List every causal language model of transformers with the result of its export; NAME shows one.

    A small model of each was exported to the listed targets and compared with PyTorch. Exit code 2 if the table does
    not have NAME.
    """
    from ..describe.architectures import AGAIN, table
    from ..errors import GqaExportError

    data = table()
    if name is not None:
        if name not in data["rows"]:
            raise GqaExportError(f"the table has no architecture {name!r}", "gqa-export models",
                                 f"`gqa-export models` lists all; for a newer transformers {AGAIN}",
                                 code="E-OPTION-ARCHITECTURE")
        data = {**data, "rows": {name: data["rows"][name]}}
    if as_json:
        click.echo(json.dumps(data, indent=1))
    else:
        show(data)


def show(data: dict[str, Any]) -> None:
    """Print the table, supported ones first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..describe.architectures import ENDS, checked, counts

    console = Console()
    for end in ENDS:
        rows = {name: row for name, row in data["rows"].items() if row["verdict"] == end}
        if not rows:
            continue
        supported = end == ENDS[0]
        shown = Table("name", "attention" if supported else "reason", *(["checked on"] if supported else []),
                      title=f"{end} ({len(rows)})", title_justify="left", box=None, pad_edge=False)
        for name, row in rows.items():
            kept = (*row.get("features", []), *row.get("states", []))
            cells = [", ".join(kept), checked(row)] if supported else [row.get("reason", "")]
            shown.add_row(name, *map(Text, cells))  # not markup: reasons hold brackets
        console.print(shown)
        console.print()
    how = ", ".join(f"{number} {end}" for end, number in counts(data).items() if number)
    version = data["versions"]["transformers"]
    console.print(f"{how}; checked on {data['date']} with transformers {version}", markup=False)
