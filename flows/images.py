"""Commands around images and models of one's own: look at a source, begin a recipe, draw, and share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs import UserError
from configs.reproduction import reproduction
from flows.options import Overrides, RecipeName, Root, labels


def register(app: typer.Typer) -> None:
    """Add the commands of this module, in the order in which a person meets them."""
    for command in (look, init, sample, export):
        app.command()(command)


def look(
    source: Annotated[str, typer.Argument(help="A folder, archive, list, glob or URL of labelled images.")],
    test_path: Annotated[str | None, typer.Option("--test-path", help="Where the test split lies, if apart.")] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Of the source; by default told by what lies there.")
    ] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="A field of data.source; repeatable.")
    ] = [],  # noqa: B006
    images: Annotated[int, typer.Option("--images", min=1, help="So many are drawn.")] = 40,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other images.")] = 0,
    output: Annotated[Path, typer.Option("--output", help="The picture to write.")] = Path("look.png"),
) -> None:
    """Say what a source of images holds, draw some of it, and print the `data:` section for a recipe."""
    from flows import look as looking

    data = looking.section_of(source, test_path, kind, overrides)
    print("\n".join(looking.look(data, images, seed, output)))


def init(
    source: Annotated[str, typer.Argument(help="A folder, archive, list, glob or URL of labelled images.")],
    test_path: Annotated[str | None, typer.Option("--test-path", help="Where the test split lies, if apart.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The recipe to write.", show_default=False)] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="A field of data.source; repeatable.")
    ] = [],  # noqa: B006
) -> None:
    """Write a recipe for images of your own: classes, counts, batches and budgets as they are seen there."""
    from flows import init as first

    print("\n".join(first.init(source, output or first.default_output(source), test_path, overrides)))


def sample(
    recipe: RecipeName = "demo",
    classes: Annotated[
        str | None, typer.Option("--classes", help="Names or labels between commas, one column each.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another seed gives other images.")] = 0,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Images of each class.")] = 1,
    output: Annotated[Path, typer.Option("--output", help="The picture to write.")] = Path("sample.png"),
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Write the recipe's whole sample for ADM's evaluator instead.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Write the recipe's whole sample as PNG files to this folder instead.")
    ] = None,
    reproduced: Annotated[
        bool, typer.Option("--reproduction", help="From what the authors released, as `reproduce` took it.")
    ] = False,
    exported: Annotated[
        str | None,
        typer.Option("--from", help="Of a folder, hf://organisation/name or models:/NAME that `export` wrote."),
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    root: Root = None,
) -> None:
    """Draw a picture of chosen classes from a trained recipe, or write its sample as files."""
    if exported is not None:
        if classes is None or overrides or npz or png or reproduced:
            raise UserError("--from takes --classes, --seed, --rows and --output: the rest is as it was exported")
        from flows import share

        print(f"wrote {share.draw(exported, classes, seed, output, rows)}")
        return
    if reproduced:
        overrides = reproduction(recipe, overrides=overrides)
    from flows import picture

    if (classes is None) == (npz is None and png is None):
        raise UserError("give either --classes for a picture, or --npz or --png for the recipe's whole sample")
    if classes is None:
        print(f"wrote {picture.write_out(recipe, npz, png, overrides, root):,} images")
    else:
        chosen = labels("--classes", classes, lambda: picture.class_names(recipe, overrides, root))
        print(f"wrote {picture.draw(recipe, chosen, seed, output, rows, overrides, root)}")


def export(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A finished run, as `compare` takes it; or give --recipe.")
    ] = None,
    target: Annotated[str, typer.Option("--to", help="A folder, hf://organisation/name, or models:/NAME.")] = "",
    recipe: RecipeName = "demo",
    overrides: Overrides = [],  # noqa: B006
    root: Root = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see it; a new repository is private otherwise.")
    ] = False,
) -> None:
    """Write a trained model as others use it: a folder that diffusers loads alone, with a model card.

    hf:// takes HF_TOKEN, or what `hf auth login` left; models:/ is MLflow's registry.
    """
    if not target:
        raise UserError("export: say where to, with --to FOLDER or --to hf://organisation/name")
    if run is not None and overrides:
        raise UserError("export: --set goes with --recipe; a RUN is exported as it was made")
    from flows import share

    print(f"wrote {share.export(run, target, recipe, overrides, root, public)}")
