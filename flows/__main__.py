"""The command line: `latentforge --help`, or `python -m flows --help`."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
import yaml

import flows  # noqa: F401  # settings first: Prefect reads them at import
from configs import UserError, load_recipe
from configs.cluster import CLUSTERS
from configs.load import RECIPES, described
from configs.race import RACES, load_race
from configs.reproduction import reproduction
from flows import artifacts, images, weights
from flows import plan as planning
from flows import serve as servers
from flows.options import Overrides, RecipeName, Root, numbers
from infra import prefect_server
from tasks.dag import FLOWS, REPRODUCE, reproducing, stages_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="latentforge: from labelled images to a sampled and scored latent diffusion model.",
    epilog="Environment: LATENTFORGE_ROOT (artifacts), LATENTFORGE_HOME (the rest), LATENTFORGE_LOGS=json, "
    "MLFLOW_TRACKING_URI, PREFECT_API_URL, RAY_ADDRESS, RAY_API_SERVER_ADDRESS, AWS_* (buckets), HF_TOKEN; all of "
    "them: docs/environment.md",
)
app.command("plan")(planning.command)
images.register(app)
app.add_typer(artifacts.app, name="artifacts", help="What lies under a root: list, show, verify, prune, why.")
app.add_typer(weights.app, name="weights", help="Read and write the published checkpoints' layouts.")


@app.command()
def run(
    flow: Annotated[str, typer.Argument(help="The flow: sfd-full, lowdiff-full or tokenizer-eval.")],
    recipe: RecipeName = "demo",
    overrides: Overrides = [],  # noqa: B006  # Typer copies it
    start: Annotated[
        str | None, typer.Option("--from", help="Redo this stage and all after it; keep those before.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Run just this stage.")] = None,
    force: Annotated[
        list[str], typer.Option("--force", help="Redo this stage though it is complete; repeatable.")
    ] = [],  # noqa: B006
    verify: Annotated[
        bool, typer.Option("--verify", help="Read and hash all files of what is reused, before anything starts.")
    ] = False,
    root: Root = None,
) -> None:
    """Run a flow here and now, reusing every stage whose inputs did not change."""
    if flow == REPRODUCE:
        raise UserError(f"run {flow}: it has a command of its own: latentforge {flow} {recipe}")
    if flow not in FLOWS:
        raise UserError(f"no flow {flow!r}: choose one of {', '.join(FLOWS)}")
    load_recipe(recipe, overrides)  # a mistake in it is told before anything large is imported
    _check_environment()
    from flows.lowdiff_full import lowdiff_full
    from flows.run import preflight
    from flows.sfd_full import sfd_full
    from flows.tokenizer_eval import tokenizer_eval
    from tasks.sources import one_look

    flows_by_name: dict[str, Any] = {
        "sfd-full": sfd_full,
        "lowdiff-full": lowdiff_full,
        "tokenizer-eval": tokenizer_eval,
    }
    perform, stages = flows_by_name[flow], stages_of(flow)
    with one_look():
        preflight(stages, recipe, overrides, root, start, only, force, verify)
        with _running():
            uri = perform(recipe=recipe, overrides=overrides, root=root, start=start, only=only, force=force)
    summary(uri)


@app.command()
def reproduce(
    recipe: Annotated[str, typer.Argument(metavar="NAME", help="A recipe that names what its authors released.")],
    unguided: Annotated[bool, typer.Option("--unguided", help="Without guidance, for the unguided score.")] = False,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="So many instead of the published number, for a look.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    root: Root = None,
) -> None:
    """Score what a paper's authors released as they did, and show the published scores beside ours."""
    changes = reproduction(recipe, unguided, images, overrides)
    _check_environment()
    from flows.reproduce import reproduce as flow
    from flows.run import preflight
    from flows.summary import show_reproduction

    preflight(stages_of(reproducing(recipe, changes)), recipe, changes, root)
    with _running():
        uri = flow(recipe=recipe, unguided=unguided, images=images, overrides=overrides, root=root)
    show_reproduction(uri)


@app.command()
def race(
    name: Annotated[str, typer.Argument(metavar="RACE", help="A race's name or a path to a YAML file.")],
    overrides: Overrides = [],  # noqa: B006
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Seeds between commas, instead of the race's own.")
    ] = None,
    root: Root = None,
) -> None:
    """Train variants of a recipe on equal budgets and seeds, score them on the way, and draw how they compare."""
    load_race(name)
    _check_environment()
    from flows.race import entries_of
    from flows.race import race as flow

    chosen = None if seeds is None else numbers("--seeds", seeds)
    entries_of(name, overrides, chosen)
    with _running():
        uri = flow(race=name, overrides=overrides, root=root, seeds=chosen)
    summary(uri)


@app.command()
def sweep(
    recipe: RecipeName = "demo",
    over: Annotated[
        list[str], typer.Option("--over", metavar="SAMPLE.FIELD=VALUE,VALUE", help="What to vary; repeatable.")
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    root: Root = None,
) -> None:
    """Sample and score a trained recipe under many settings of guidance, solver or steps."""
    load_recipe(recipe, overrides)
    _check_environment()
    from flows.sweep import settings_of
    from flows.sweep import sweep as flow
    from tasks.sources import one_look

    with one_look():
        settings_of(recipe, over, overrides, root)
        with _running():
            uri = flow(over=over, recipe=recipe, overrides=overrides, root=root)
    summary(uri)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="[RUN RUN…]", help="Names or ids of runs, or folders or URLs of artifacts.")
    ] = [],  # noqa: B006
    last: Annotated[int, typer.Option("--last", min=2, help="Without RUNs: so many of the newest.")] = 2,
    root: Root = None,
) -> None:
    """Put finished runs side by side in a table, charts and one page: the last two, or those that are named.

    A run's id is what `run` prints at its end; its first letters are enough.
    """
    from flows.compare import compare as side_by_side
    from flows.finding import newest

    _check_environment("home", "MLflow")
    summary(side_by_side(runs or newest(last), root).uri)


def summary(uri: str) -> None:
    """Say what a run came to, and how to look further."""
    from flows.summary import show

    show(uri)


@app.command()
def recipes() -> None:
    """List the recipes, races and clusters that come with the project, and what each is for."""
    found = {"Recipes": described(RECIPES), "Races": described(RACES), "Clusters": described(CLUSTERS)}
    indent = 4 + max(len(name) for each in found.values() for name in each)
    for title, entries in found.items():
        print(title)
        for name, said in entries.items():
            lines = textwrap.wrap(said, shutil.get_terminal_size((80, 24)).columns - indent)
            print(f"  {name:<{indent - 2}}" + f"\n{' ' * indent}".join(lines))


@app.command()
def show(recipe: RecipeName = "demo", overrides: Overrides = []) -> None:  # noqa: B006
    """Print a recipe as it resolves, validated."""
    print(yaml.safe_dump(load_recipe(recipe, overrides).model_dump(mode="json"), sort_keys=False), end="")


@app.command()
def serve(
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow UI.")] = 5000,
    listen: Annotated[
        str, typer.Option(help="On a cluster's head: its private address, where machines that train find MLflow.")
    ] = servers.LOOPBACK,
) -> None:
    """Start Prefect's server and worker and the MLflow UI, all on loopback, and register the deployments."""
    _check_environment("home", "temporary folder", "disk")
    servers.serve(prefect_port, mlflow_port, listen)


@app.command()
def studio(
    root: Root = None,
    port: Annotated[int, typer.Option(help="Port of the page.")] = 8090,
    listen: Annotated[
        str, typer.Option(help="Another address of this machine; needs a token in LATENTFORGE_STUDIO_TOKEN.")
    ] = servers.LOOPBACK,
) -> None:
    """Look at data, reconstructions and runs and sample from models, on one page over a root of artifacts."""
    from flows.studio.serve import serve

    _check_environment("home")
    serve(root, port, listen)


@app.command()
def doctor() -> None:
    """Look at this machine and what its environment names; paste what this prints into a bug report."""
    from flows.doctor import report

    text, sound = report()
    print(text)
    if not sound:
        sys.exit(1)


def _check_environment(*names: str) -> None:
    """Refuse what would fail later, and say in a line each what would only be slower."""
    from infra import environment

    for note in environment.require(*names):
        print(f"note: {note.text}", file=sys.stderr)


@contextmanager
def _running() -> Iterator[None]:
    """What a flow needs around it: Prefect's server, quiet libraries, and an end in one line when it is stopped."""
    from infra import progress, quiet, stopping

    def farewell(number: int) -> None:
        from infra import open_runs

        open_runs.note_cancelled()
        redo = [option for option in ("--force", "--from") if option in sys.argv]
        without = f" without {' and '.join(redo)}" if redo else ""
        if needed := stopping.options():  # without it what was there before would be reused
            without = f" with {needed}"
        place = stopping.where() or progress.where()
        said = f"stopped{f' at {place}' if place else ''}; the same command{without} goes on\n"
        os.write(sys.stderr.fileno(), said.encode())

    stopping.take_signals(farewell)
    try:
        prefect_server.start()
        _quiet_tracebacks()
        with quiet.console():
            yield
    except BaseException:
        if not stopping.asked():
            raise
    if stopping.asked():  # Prefect gives other exceptions for it, or takes it for an end
        with suppress(Exception):
            from prefect.events.worker import EventsWorker

            EventsWorker.drain_all(timeout=2.0)  # states of tasks that its server has not seen yet
        stopping.leave()


class _OneLine(logging.Filter):
    """Prefect logs a failed task's traceback; for a person's mistake the message is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, UserError):
            record.exc_info, record.exc_text = None, None
            record.msg, record.args = "stopped: %s", (error,)
        return True


class _NotHere(logging.Filter):
    """Keeps a mistake off the console, where the command's last line tells it, that a stage ended, which its own line
    says, and pages of a server that has none; Prefect's log of the run has the others."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not (
            text.startswith(_SAID_OTHERWISE)
            or (text.startswith("Finished in state Failed") and "UserError" in text)
            or (text.startswith("View at ") and prefect_server.is_temporary())
        )


_SAID_OTHERWISE = ("stopped: ", "Finished in state Completed", "Finished in state Cached", "Beginning flow run")

_CHATTER = (
    "mlflow.store.db.utils",
    "ray._private.authentication.authentication_token_setup",
    "ray.data._internal.progress",
)
"""Their notes tell a person nothing to act upon. Named one by one: libraries set the levels of their own roots."""


def _quiet_tracebacks() -> None:
    from prefect.logging import get_logger
    from prefect.logging.handlers import PrefectConsoleHandler

    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("task_runs", "flow_runs", "engine", "task_engine", "flow_engine"):
        get_logger(name).addFilter(_OneLine())
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_NotHere())


def main() -> None:
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
