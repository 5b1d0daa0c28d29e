"""What MLflow and Prefect show of a flow run beside its stages: how far one is, and in the end what came of it."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import cast
from uuid import UUID

from configs import naming
from configs.errors import brief
from infra import logs
from infra.artifacts import Artifact, Manifest
from infra.storage import Storage
from infra.tracking import Tracker

_SECONDS_BETWEEN_LOOKS = 5.0
_REST, _LONGEST_REST = 20, 60.0
"""Times as long as a look took until the next one, and the most seconds: an outage took long, too."""
_SCORED = ("evaluate", "evaluate_tokenizer")
_FLOOR = "floor_"
_SHEETS = ("generated.png", "report.html")


@contextmanager
def moving(stage: str, share: Callable[[], float | None]) -> Iterator[None]:
    """Keep a bar in Prefect while a stage works, wherever it does. It comes to its end if the stage does.

    share: of the work that is done, 0 to 1; None where that is not known (yet).
    """
    bar, ended, context = _Bar(stage), threading.Event(), contextvars.copy_context()

    def follow() -> None:
        pause = _SECONDS_BETWEEN_LOOKS
        while not ended.wait(pause):
            began = time.monotonic()
            with suppress(Exception):  # a server that is away for a while loses a bar's step, not the run
                if (found := share()) is not None:
                    bar.move(found)
            # After days of training a look reads a curve of many thousand points.
            rest = min(_LONGEST_REST, _REST * (time.monotonic() - began))
            pause = max(_SECONDS_BETWEEN_LOOKS, rest)

    thread = threading.Thread(target=context.run, args=(follow,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_SECONDS_BETWEEN_LOOKS)
    with suppress(Exception):
        bar.move(1.0)


class _Bar:
    """A progress artifact of the task under way, made at its first move."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._artifact: UUID | None = None

    def move(self, share: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = 100 * min(1.0, share)
        told = f"{self._stage}: {percent:.0f} %"
        if self._artifact is None:
            self._artifact = cast(UUID, create_progress_artifact(percent, description=told))
        else:
            update_progress_artifact(self._artifact, percent, description=told)


def conclude(uri: str, name: str, tracker: Tracker, flow_run: str) -> None:
    """Put report, picture and a note with the scores where a person looks first, in MLflow and in Prefect.

    The run is whole without either: a server that is away by then is a warning.
    """
    artifact, scored = _found(uri)
    if scored is None:
        return
    place = f"{artifact.uri}/report.html" if artifact.stage == "report" else artifact.uri
    try:
        page = note(name, scored, place, tracker)
        tracker.tag(**{"mlflow.note.content": page})
        for sheet in _SHEETS:
            if artifact.files(sheet):
                tracker.file(sheet, artifact.read(sheet))
    except Exception as error:
        page = note(name, scored, place, Tracker())
        logs.say(f"MLflow did not take the run's report and note ({brief(error)})", "warning")
    if flow_run:
        from prefect.artifacts import create_markdown_artifact

        with suppress(Exception):
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
        server = tracker.uri.rstrip("/")
        shown = [f"[{what}]({server}/{tracker.page(at)})" for what, at in (("run", ""), ("report", _SHEETS[1]))]
        where += f"\n\nMLflow: {', '.join(shown)}" if server.startswith("http") else f"\n\nMLflow run `{tracker.run}`"
    return f"**{name}**\n\n" + "\n".join(rows) + where


def counting(stage: str, scores: Mapping[str, float]) -> dict[str, float]:
    """The scores that belong on the whole run's page, those of real images last; a stage's own page has all of it."""
    if stage not in _SCORED:
        return {}
    ordered = sorted(scores, key=lambda name: name.startswith(_FLOOR))
    return {f"{stage}/{name}": scores[name] for name in ordered}


def differing(recipe: str, overrides: list[str]) -> dict[str, str]:
    """Each field that the options changed, and what it is now."""
    from configs import load_recipe

    if not overrides:
        return {}
    before, now = (naming.flat(load_recipe(recipe, each).model_dump(mode="json")) for each in ([], overrides))
    changed = {name: value for name, value in now.items() if before.get(name) != value}
    return {name: str(value) for name, value in changed.items()}


def _found(uri: str) -> tuple[Artifact, Manifest | None]:
    root, stage, fingerprint = Storage.at(uri).url.rsplit("/", 2)
    artifact = Artifact(root, stage, fingerprint)
    if stage == "report":
        return artifact, Artifact(root, "evaluate", artifact.manifest.inputs["evaluate"]).manifest
    return artifact, artifact.manifest if stage in _SCORED else None
