"""`latentforge weights tokenizer`: whether a recipe's tokenizer keeps its contract, promise by promise."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.load import load_recipe


def tokenizer(
    recipe: Annotated[str, typer.Option(help="A recipe's name or a path to a YAML file.")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Lay a value upon the recipe; repeatable.")
    ] = [],  # noqa: B006  # Typer copies it
) -> None:
    """Try a recipe's tokenizer on drawn images: shapes, range, determinism, batches, round trip."""
    loaded = load_recipe(recipe, overrides)
    from infra.trust import trust
    from models.tokenizer_kit import try_out
    from tasks.networks import given_autoencoder

    trust(loaded.model_dump(mode="json"))
    findings = try_out(given_autoencoder(loaded.train_vavae), loaded.image.size)
    table = Table("promise", "kept", "seen", title=f"tokenizer of {loaded.name}, {loaded.image.size} pixels")
    for each in findings:
        table.add_row(each.promise, "yes" if each.kept else "no", each.seen)
    Console(markup=False).print(table)
    broken = [each.promise for each in findings if not each.kept]
    if broken:
        raise UserError(f"the tokenizer of {loaded.name} breaks its contract: {', '.join(broken)}")
