"""What MLflow and Prefect show of a flow run beside its stages: how far one is, and in the end what came of it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from configs import naming
from infra import progress
from infra.artifacts import Artifact, Manifest
from infra.storage import Storage
from infra.tracking import Tracker

_SECONDS_BETWEEN_LOOKS = 5.0
_SCORED = ("evaluate", "evaluate_tokenizer")
_FLOOR = "floor_"
_SHEETS = ("generated.png", "report.html")


@contextmanager
def moving(stage: str, tracker: Tracker, images: int | None = None) -> Iterator[None]:
    """Keep a bar in Prefect while a stage works in this process or in its workers.

    images: that a training sees in all; its workers tell MLflow how far they are. Other stages show a bar here.
    """
    ended, context = threading.Event(), contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_move, ended, stage, tracker, images), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_SECONDS_BETWEEN_LOOKS)


def _move(ended: threading.Event, stage: str, tracker: Tracker, images: int | None) -> None:
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    bar: Any = None
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        with suppress(Exception):  # a server that is away for a while loses a bar's step, not the run
            share = _trained(tracker, images) if images else progress.share()
            if share is None:
                continue
            told = f"{stage}: {100 * share:.0f} %"
            if bar is None:
                bar = create_progress_artifact(100 * share, description=told)
            else:
                update_progress_artifact(bar, 100 * share, description=told)
    if bar is not None:
        with suppress(Exception):
            update_progress_artifact(bar, 100.0, description=f"{stage}: done")


def _trained(tracker: Tracker, images: int) -> float | None:
    seen = tracker.last_step("images_per_second")
    return None if seen is None else min(1.0, seen / images)


def conclude(uri: str, name: str, tracker: Tracker, flow_run: str) -> None:
    """Put report, picture and a note with the scores where a person looks first, in MLflow and in Prefect."""
    artifact, scored = _found(uri)
    if scored is None:
        return
    place = f"{artifact.uri}/report.html" if artifact.stage == "report" else artifact.uri
    page = note(name, scored, place, tracker)
    tracker.tag(**{"mlflow.note.content": page})
    for sheet in _SHEETS:
        if artifact.files(sheet):
            tracker.file(sheet, artifact.read(sheet))
    if flow_run:
        from prefect.artifacts import create_markdown_artifact

        with suppress(Exception):  # the run is whole without it
            create_markdown_artifact(page, key="scores", description=name)


def note(name: str, scored: Manifest, report: str, tracker: Tracker) -> str:
    """Markdown: scores beside those of real images, and where report and run are."""
    rows = ["| score | this run | real images |", "|---|---|---|"]
    scores = {each: value for each, value in scored.scores.items() if not each.startswith(_FLOOR)}
    for each, value in scores.items():
        floor = scored.scores.get(_FLOOR + each)
        rows.append(f"| {each} | {value:.4g} | {'–' if floor is None else f'{floor:.4g}'} |")
    where = f"\n\nReport: `{report}`"
    if tracker.run:
        server = tracker.uri.rstrip("/") if tracker.uri.startswith("http") else ""
        where += f"\n\nMLflow: {server}/{tracker.page}" if server else f"\n\nMLflow run `{tracker.run}`"
    return f"**{name}**\n\n" + "\n".join(rows) + where


def counting(stage: str, scores: Mapping[str, float]) -> dict[str, float]:
    """The scores of a stage that belong on the whole run's page; all of them are on the stage's own."""
    if stage in _SCORED:
        return {f"{stage}/{name}": value for name, value in scores.items()}
    return {f"{stage}/{name}": scores[name] for name in ("images_per_second",) if name in scores}


def differing(recipe: str, overrides: list[str]) -> dict[str, str]:
    """Tags to search by: the run's name, and each changed field."""
    from configs import load_recipe

    if not overrides:
        return {}
    before, now = (naming.flat(load_recipe(recipe, each).model_dump(mode="json")) for each in ([], overrides))
    changed = {name: value for name, value in now.items() if before.get(name) != value}
    return {f"changed.{name}": str(value) for name, value in changed.items()}


def _found(uri: str) -> tuple[Artifact, Manifest | None]:
    root, stage, fingerprint = Storage.at(uri).url.rsplit("/", 2)
    artifact = Artifact(root, stage, fingerprint)
    if stage == "report":
        return artifact, Artifact(root, "evaluate", artifact.manifest.inputs["evaluate"]).manifest
    return artifact, artifact.manifest if stage in _SCORED else None
