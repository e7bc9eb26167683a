"""Options of every verb that reads a checkpoint. Imports click only."""

from __future__ import annotations

import click

trust_options = click.option("--allow-pickle", is_flag=True,
                             help="Also read weights from pickle files; their code is not run.")
unused_option = click.option("--ignore-unused", is_flag=True,
                             help="Note tensors of the checkpoint that the model does not use, instead of refusing "
                                  "them.")
revision_option = click.option("--revision", default=None, metavar="REV",
                               help="Branch, tag or commit of a hub id.  [default: its main branch]")
