"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from configs import UserError

RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name (see `recipes`) or a path to a YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Lay a value upon the recipe; repeatable.")
]
Root = Annotated[
    str | None, typer.Option("--root", help="Where artifacts live: a folder or a URL such as s3://bucket/prefix.")
]


def numbers(option: str, text: str) -> list[int]:
    """`207,360` → [207, 360]. Raises UserError on anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: expected numbers between commas, for example 207,360") from None
