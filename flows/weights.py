"""`latentforge weights`: published checkpoints in, ours out, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from flows.options import writing
from flows.own_parts import tokenizer
from models.kinds import Kind

if TYPE_CHECKING:  # torch is imported where weights are read: `--help` and other commands need none
    from models.checkpoints import Checkpoint, Statistics

app = typer.Typer(no_args_is_help=True, help="Read and write the published checkpoints' layouts.")

app.command("tokenizer")(tokenizer)

Location = Annotated[str, typer.Argument(help="A path, an fsspec URL, or hf://organisation/repository/file.")]
Heads = Annotated[int | None, typer.Option("--num-heads", help="Attention heads, where the file cannot tell.")]
Wanted = Annotated[
    Kind | None, typer.Option("--kind", help="Which network, where a file holds several.", show_default=False)
]
Semantic = Annotated[
    int | None, typer.Option("--semantic-channels", help="Semantic channels of a two-clock network, if not 16 of 48.")
]
_STATISTICS = {"latent": "latents_stats.pt", "texture": "latents_stats.pt", "semantic": "latents_sv_stats.pt"}


@app.command("import")
def import_(
    location: Location,
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    statistics: Annotated[
        str | None, typer.Option("--statistics", help="Their latents_stats.pt, kept with the weights.")
    ] = None,
    semantic_statistics: Annotated[
        str | None, typer.Option("--semantic-statistics", help="Their latents_sv_stats.pt (SFD).")
    ] = None,
    kind: Wanted = None,
    num_heads: Heads = None,
    semantic_channels: Semantic = None,
) -> None:
    """Convert a checkpoint in the authors' layout to our safetensors, with config and statistics."""
    from models.checkpoints import write

    if output.suffix != ".safetensors":
        raise UserError(f"output {output}: our format is safetensors; give a name that ends in .safetensors")
    checkpoint = _whole(location, kind, num_heads, semantic_channels)
    found = _statistics(checkpoint, statistics, semantic_statistics)
    checkpoint = dataclasses.replace(checkpoint, statistics=checkpoint.statistics | found)
    if not checkpoint.arguments:
        raise UserError(
            f"weights {location}: the tensors alone do not say how the {checkpoint.kind} is built; "
            f"give --num-heads, and --semantic-channels for a two-clock network"
        )
    with writing(output, RuntimeError):
        write(output, checkpoint)
    _show(checkpoint, str(output))


@app.command()
def export(
    location: Location,
    output: Annotated[Path, typer.Argument(help="The torch file to write; statistics go beside it.")],
    kind: Wanted = None,
) -> None:
    """Convert a checkpoint of ours back to the authors' layout."""
    from infra.weights import load_checkpoint
    from models.checkpoints import write_authors, write_statistics

    checkpoint = load_checkpoint(location, kind=kind)
    written = [output]
    with writing(output, RuntimeError):
        write_authors(output, checkpoint)
    for group, statistics in checkpoint.statistics.items():
        target = output.with_name(_STATISTICS.get(group, f"{group}_stats.pt"))
        with writing(target, RuntimeError):
            write_statistics(target, statistics)
        written.append(target)
    for path in written:
        typer.echo(f"wrote {path}")


@app.command()
def inspect(
    location: Location, kind: Wanted = None, num_heads: Heads = None, semantic_channels: Semantic = None
) -> None:
    """Say what a checkpoint holds, without writing anything."""
    from infra.weights import fetch
    from models.checkpoints import TENSORS_ONLY, facts_of

    facts = facts_of(fetch(location))
    if facts.keys() == TENSORS_ONLY:
        table = Table("what", "value", title=location)
        table.add_row("holds", facts["kind"])
        _show_made(table, facts["made"])
        Console(markup=False).print(table)
        return
    _show(_whole(location, kind, num_heads, semantic_channels), location)


@app.command()
def probe(
    recipe: Annotated[str, typer.Option(help="A recipe's name or a path to a YAML file.")],
    location: Annotated[str | None, typer.Argument(help="Weights in place of train_dit.pretrained.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Latents to look at.")] = 64,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Lay a value upon the recipe; repeatable.")
    ] = [],  # noqa: B006  # Typer copies it
    root: Annotated[str | None, typer.Option(help="Where the recipe's latents lie, if `encode` made them.")] = None,
) -> None:
    """The loss of weights on a recipe's latents by channel group and time, beside what was published: a minute that
    shows whether tokenizer, latents and statistics are those that the weights were trained on."""
    from configs import load_recipe
    from flows.inputs import latents_of
    from tasks.training import probe as probing

    weights = [] if location is None else [f"train_dit.pretrained={location}"]
    loaded = load_recipe(recipe, [*overrides, *weights])
    if loaded.ready_latents:
        latents = probing.ready_latents(loaded, images)
    else:
        latents = probing.stored_latents(latents_of(loaded, recipe, root), images)
    found = probing.probe(loaded, latents)
    table = Table("time", *found.by_time, title=f"loss on {found.images} latents, by time from noise to data")
    table.add_row("all", *(f"{found.by_group[group]:.4f}" for group in found.by_time))
    table.add_section()
    for number in range(probing.BINS):
        errors = [each[number] for each in found.by_time.values()]
        table.add_row(f"{number / probing.BINS:.1f}", *("" if each is None else f"{each:.3f}" for each in errors))
    Console(markup=False).print(table)
    typer.echo(found.verdict)


def _whole(location: str, kind: Kind | None, num_heads: int | None, semantic_channels: int | None) -> Checkpoint:
    from infra.weights import load_checkpoint
    from models.checkpoints import check_whole

    checkpoint = load_checkpoint(location, kind=kind, num_heads=num_heads, semantic_channels=semantic_channels)
    try:
        check_whole(checkpoint)
    except ValueError as error:
        raise UserError(f"weights {location}: {error}; it is another network's file") from None
    return checkpoint


def _statistics(checkpoint: Checkpoint, texture: str | None, semantic: str | None) -> dict[str, Statistics]:
    from infra.weights import load_statistics
    from models.formats import groups_of

    given = {0: texture, 1: semantic}
    if texture is None and semantic is None:
        return {}
    if checkpoint.kind != "lightningdit" or not checkpoint.arguments:
        raise UserError("latent statistics belong to a LightningDiT whose channels are known; leave them out")
    groups = groups_of(checkpoint.arguments)
    found = {}
    for index, location in given.items():
        if location is None:
            continue
        if index >= len(groups):
            raise UserError("--semantic-statistics needs a two-clock network; this one has a single channel group")
        statistics = load_statistics(location)
        if len(statistics.mean) != groups.sizes[index]:
            raise UserError(
                f"statistics {location}: {len(statistics.mean)} channels, but the {groups.names[index]} channels "
                f"of the network are {groups.sizes[index]}"
            )
        found[groups.names[index]] = statistics
    return found


def _show(checkpoint: Checkpoint, name: str) -> None:
    table = Table("what", "value", title=name)
    count = sum(value.numel() for value in checkpoint.tensors.values())
    kinds = sorted({str(value.dtype).removeprefix("torch.") for value in checkpoint.tensors.values()})
    table.add_row("kind", checkpoint.kind)
    table.add_row("tensors", f"{len(checkpoint.tensors)} with {count / 1e6:.2f} M values, {', '.join(kinds)}")
    table.add_row("found under", ", ".join(checkpoint.nesting) or "nothing (flat)")
    table.add_row("unaveraged weights", "kept beside" if checkpoint.raw else "none")
    for group, statistics in checkpoint.statistics.items():
        low, high = statistics.std.min().item(), statistics.std.max().item()
        told = f"{len(statistics.mean)} channels, deviations {low:.3g} to {high:.3g}"
        table.add_row(f"statistics of {group}", told)
    for key, value in checkpoint.arguments.items():
        table.add_row(key, str(value))
    if not checkpoint.arguments:
        table.add_row("config", "unknown: give --num-heads, --semantic-channels")
    if checkpoint.extra:
        table.add_row("kept for training", ", ".join(checkpoint.extra))
    _show_made(table, checkpoint.made)
    if checkpoint.dropped:
        table.add_row("left out", f"{len(checkpoint.dropped)} tensors such as {', '.join(checkpoint.dropped[:3])}")
    Console(markup=False).print(table)


def _show_made(table: Table, made: Mapping[str, Any]) -> None:
    """Where a file of ours comes from, as far as it says so."""
    for key in ("stage", "fingerprint", "recipe", "file"):
        if key in made:
            table.add_row(f"made by {key}" if key in ("stage", "recipe") else key, made[key])
    for name, section in made.get("sections", {}).items():
        told = ", ".join(f"{key} {value}" for key, value in section.items()) if isinstance(section, dict) else section
        table.add_row(name, str(told))
