"""Finished runs by what a person calls them: a name, an id or its beginning, a folder or URL."""

from __future__ import annotations

from collections.abc import Sequence

from configs import UserError
from infra import tracking
from infra.artifacts import MANIFEST, Artifact
from infra.home import default_root
from infra.storage import Storage
from infra.tracking import FoundRun

_SHORTEST = 4
"""Letters of an id that are taken for its beginning."""
_LISTED = 8


def evaluation_of(run: str) -> Artifact:
    """The evaluation that a run, an artifact or a root leads to.

    run: an MLflow run by its name, its id or the beginning of that; the beginning of an evaluation's fingerprint; the
        folder or URL of an `evaluate` or `report` artifact, or of a root that holds a single evaluation.

    Raises:
        UserError: there is none, it is not finished, or several are meant.
    """
    place = Storage.at(run) if "/" in run else None
    return _named(run) if place is None else _placed(run, place)


def newest(count: int) -> list[str]:
    """Ids of the newest runs that lead to different evaluations, the oldest of them first.

    Raises:
        UserError: there are not so many.
    """
    found: dict[str, str] = {}
    for run in tracking.evaluated_runs():
        found.setdefault(run.evaluation, run.id)
    if len(found) < count:
        raise UserError(
            f"{len(found)} different evaluations are known to MLflow at {tracking.tracking_uri()}, wanted the last "
            f"{count}: name runs, or folders of artifacts"
        )
    return list(found.values())[:count][::-1]


def _placed(run: str, place: Storage) -> Artifact:
    if place.exists(MANIFEST):
        root, stage, name = place.url.rstrip("/").rsplit("/", 2)
        artifact = Artifact(root, stage, name)
        if stage == "report":
            artifact = Artifact(root, "evaluate", artifact.manifest.inputs["evaluate"])
        if artifact.stage != "evaluate":
            raise UserError(f"{run} is an artifact of stage {stage}, which has no scores: name its evaluate artifact")
        artifact.manifest  # noqa: B018  # which raises where it is not complete
        return artifact
    names = _evaluations(place)
    if len(names) != 1:
        known = ", ".join(f"{place.url}/evaluate/{name}" for name in names)
        raise UserError(
            f"{run} holds {len(names)} evaluations, expected one: " + (f"name one of {known}" if known else "run one")
        )
    return Artifact(place.url, "evaluate", names[0])


def _evaluations(place: Storage) -> list[str]:
    return sorted({name.split("/")[1] for name in place.names("evaluate") if name.endswith(MANIFEST)})


def _named(run: str) -> Artifact:
    known = tracking.evaluated_runs()
    by_name = [each for each in known if each.name == run]
    by_id = [each for each in known if len(run) >= _SHORTEST and each.id.startswith(run)]
    for fit in (by_name, by_id):
        meant = {each.evaluation: each for each in reversed(fit)}  # of runs of one evaluation the newest
        if len(meant) > 1:
            raise UserError(f"{run!r} may be {_listed(list(meant.values()))}: give one of these ids")
        for each in meant.values():
            artifact = Artifact(each.root, "evaluate", each.evaluation)
            artifact.manifest  # noqa: B018
            return artifact
    place = Storage.at(default_root())
    begun = [name for name in _evaluations(place) if len(run) >= _SHORTEST and name.startswith(run)]
    if len(begun) == 1:
        return Artifact(place.url, "evaluate", begun[0])
    tags = tracking.run_tags(run)
    if tags is not None:
        raise UserError(
            f"MLflow run {run} has no evaluation: name the run of a flow that finished it, or its evaluate artifact"
        )
    there = f"; there are {_listed(known)}" if known else ""
    raise UserError(
        f"no run {run!r} in MLflow at {tracking.tracking_uri()}, no such evaluation in {place.url}, and no folder or "
        f"URL (which has a /){there}"
    )


def _listed(runs: Sequence[FoundRun]) -> str:
    shown = ", ".join(f"{each.id[:8]} ({each.name})" for each in runs[:_LISTED])
    return f"{shown} …" if len(runs) > _LISTED else shown
