"""The last lines of a run: what it scored, where picture and page lie, and how to look further."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flows.plan import duration
from infra.artifacts import Artifact, Manifest
from infra.storage import Storage
from infra.tracking import own_run, tracking_uri

_FLOOR = "floor_"


def show(uri: str) -> None:
    """Print what an artifact came to; of a report, what its run came to."""
    artifact, scored = _at(uri)
    console = _console()
    if scored.scores:
        console.print(_scores(scored))
    for what, place in _places(artifact, artifact.manifest):
        console.print(f"{what:<8} {place}", soft_wrap=True, highlight=False)


def show_reproduction(uri: str) -> None:
    """Print the published scores beside ours, and the line that says what they depend on."""
    from flows.reproduce import result_of

    result = result_of(_at(uri)[1])
    table = Table("score", title="as published, and here")
    for column in ("published", "here", "difference"):
        table.add_column(column, justify="right")
    for row in result.rows:
        far = "–" if row.difference is None else f"{row.difference:+.3g}"
        table.add_row(row.name, _number(row.published), _number(row.here), far)
    show(uri)
    console = _console()
    console.print(table)
    console.print(f"verdict  {result.verdict}", soft_wrap=True, highlight=False)


def _at(uri: str) -> tuple[Artifact, Manifest]:
    """The artifact of this URI, and the manifest with its scores: of a report, that of the stage `evaluate`."""
    root, stage, fingerprint = Storage.at(uri).url.rsplit("/", 2)
    artifact = Artifact(root, stage, fingerprint)
    if stage != "report":
        return artifact, artifact.manifest
    return artifact, Artifact(root, "evaluate", artifact.manifest.inputs["evaluate"]).manifest


def _console() -> Console:
    """For texts as they are: a folder called [old] is no style."""
    return Console(width=None if sys.stdout.isatty() else 80, markup=False)


def _scores(manifest: Manifest) -> Table:
    """Scores with a floor beside it first, then what has none."""
    floors = {name.removeprefix(_FLOOR): value for name, value in manifest.scores.items() if name.startswith(_FLOOR)}
    own = {name: value for name, value in manifest.scores.items() if not name.startswith(_FLOOR)}
    published = _published(manifest)
    table = Table("score", title=f"{manifest.stage} {manifest.fingerprint}")
    for column, values in (("here", own), ("real images", floors), ("published", published)):
        if values:
            table.add_column(column, justify="right")
    for name in sorted(own, key=lambda name: (name not in floors, name)):
        cells = [_number(own[name])]
        cells += [_number(floors.get(name))] if floors else []
        cells += [_number(published.get(name))] if published else []
        table.add_row(name, *cells)
    return table


def _published(manifest: Manifest) -> Mapping[str, float]:
    """By the names that scores have here."""
    from configs.load import read_recorded
    from configs.published import scores_of

    found = scores_of(manifest.stage, read_recorded(manifest.recipe))
    return {} if found is None else found.named


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _places(artifact: Artifact, manifest: Manifest) -> list[tuple[str, str]]:
    """What lies where; a local file is named by its path, which any terminal opens."""
    names = [entry.path for entry in manifest.files]
    local = artifact.storage.local

    def place(name: str) -> str:
        return str(Path(artifact.storage.path) / name) if local else f"{artifact.uri}/{name}"

    pictures = [name for name in names if name.endswith(".png")]
    shown = [name for name in pictures if name.startswith("generated")] or pictures[:1]
    places = [("result", artifact.uri)]
    places += [("page", place(name)) for name in names if name.endswith(".html")]
    places += [("picture", place(name)) for name in shown]
    run = own_run()
    if run is not None and run.run:
        places.append(("run", run.run[:8]))
        places.append(("further", f"latentforge compare; latentforge export {run.run[:8]} --to FOLDER"))
        places.append(("time", duration(run.seconds)))
    return [*places, ("MLflow", _run_page())]


def _run_page() -> str:
    """Where MLflow shows this run: on its server, or on one that a command starts on our database."""
    uri, run = tracking_uri(), own_run()
    page = "" if run is None else run.page()
    if uri.startswith(("http://", "https://")):
        return f"{uri.rstrip('/')}/{page}"
    started = shlex.join([sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri])
    return f"{started}  →  http://127.0.0.1:5000/{page}"
