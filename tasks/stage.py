"""The contract of a stage: plain values and artifact references in, one artifact reference out.

A stage is a name, the recipe sections it reads, the stages it follows and a function. `perform` is all
that ever runs one, in this process or as a Ray job: what the function needs is in the :class:`Job`, which
is plain JSON, and what it leaves is in storage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from configs.errors import Unreachable, UserError
from configs.load import validate
from configs.recipe import Recipe
from infra import progress
from infra.artifacts import Artifact, Manifest, fingerprint, library_versions, timestamp
from infra.claims import Claim, claimed
from infra.locks import alone
from infra.logs import say
from infra.storage import FileEntry, Storage
from infra.tracking import Tracker
from infra.trust import trust
from tasks.data.lineage import first_set


@dataclass(frozen=True)
class Job:
    """Everything one run of a stage needs, as plain values."""

    stage: str
    fingerprint: str
    root: str
    recipe: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprint of each input artifact by stage name, all under `root`."""
    sections: dict[str, Any]
    """What the fingerprint covers."""
    tracking: dict[str, str] = field(default_factory=dict)
    """`uri` and `run` of the stage's MLflow run, `prefect_flow_run`; empty runs untracked."""
    replaces: str = ""
    """The :meth:`Artifact.mark` of a complete artifact that is made anew; empty where nothing is replaced."""
    claim: dict[str, Any] = field(default_factory=dict)
    """Number and token of the :class:`Claim` under which the artifact is made; actors write under it too."""
    following: list[dict[str, float]] = field(default_factory=list)
    """What each worker or actor of the next stage asks Ray for, where it needs other machines than this one."""


@dataclass
class Outcome:
    """What a stage's function returns; `perform` turns it into the manifest."""

    files: list[FileEntry]
    rows: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a stage's function sees."""

    job: Job

    def __post_init__(self) -> None:
        trust(self.job.recipe)

    @cached_property
    def recipe(self) -> Recipe:
        return validate(self.job.recipe)

    @cached_property
    def artifact(self) -> Artifact:
        return Artifact(self.job.root, self.job.stage, self.job.fingerprint)

    @cached_property
    def out(self) -> Storage:
        """Where the stage writes, while its claim is held; partial output of an interrupted run may lie here."""
        place = self.artifact.beside if self.job.replaces else self.artifact.storage
        return replace(place, guard=Claim(self.artifact.storage, **self.job.claim).check) if self.job.claim else place

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to do: the artifact is complete, and no longer the one to be replaced."""
        if self.job.replaces:
            return self.artifact.mark() not in ("", self.job.replaces)
        return self.artifact.is_complete()

    def input(self, stage: str) -> Artifact:
        """An input artifact; complete, or its manifest raises."""
        return Artifact(self.job.root, stage, self.job.inputs[stage])

    def optional(self, stage: str) -> Artifact | None:
        """An input artifact that some recipes do without; None where this one does."""
        return self.input(stage) if stage in self.job.inputs else None

    @cached_property
    def tracker(self) -> Tracker:
        return Tracker.of(self.job.tracking)


@dataclass(frozen=True)
class Stage:
    """One verb of the DAG."""

    name: str
    version: int
    sections: tuple[str, ...]
    """Recipe sections it reads; they enter the fingerprint."""
    inputs: tuple[str, ...]
    """Stages whose artifacts it reads, where the recipe has them."""
    run: Callable[[Context], Outcome]
    external: Callable[[Recipe], Mapping[str, str] | None] | None = None
    """Identities of what it reads from outside the root (a source's listing, a file's hash), if it reads any."""
    present: Callable[[Recipe], bool] = lambda recipe: True
    """Whether a recipe has this stage at all."""
    on_first_set: bool = False
    """Whether, where a set grows, it stays with the images that it was made on: those that the set began with."""
    check: Callable[[Recipe], None] | None = None
    """Opens what it is given from outside (weights, statistics) and raises UserError where that does not fit the
    recipe: before any stage runs, since the one that needs it may come days later."""

    @property
    def trains(self) -> bool:
        """Whether Ray Train does it, on `compute.train`'s workers."""
        return self.name.startswith(("train_", "tune_"))

    def share(self, context: Context) -> Callable[[], float | None]:
        """How far it is, 0 to 1: what this process shows, or what a training's workers told of; None where that is not
        known (yet)."""
        if self.trains:
            return partial(context.tracker.seen_of, getattr(context.recipe, self.name).images)
        return progress.share

    def fingerprint(self, recipe: Recipe, inputs: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """The fingerprint of this stage's output and the sections it covers."""
        sections = {name: recipe.section(name) for name in self.sections}
        if self.external is not None and (found := self.external(recipe)) is not None:
            sections["external"] = dict(found)
        if "data" in sections:
            sections["data"] = _without_places(sections["data"])
        return fingerprint(self.name, self.version, sections, inputs), sections

    def job(
        self,
        recipe: Recipe,
        root: str,
        inputs: Mapping[str, str],
        tracking: Mapping[str, str] | None = None,
    ) -> Job:
        """What this stage does to a recipe and artifacts.

        root: URL under which all artifacts lie.
        inputs: fingerprints by stage; others than the stage's own are refused by the artifact's readers, not here.
        tracking: as in :class:`Job`.

        Raises UserError where `shard.grows` names no complete set.
        """
        if self.on_first_set and recipe.shard.grows is not None and "shard" in inputs:
            inputs = {**inputs, "shard": first_set(root, recipe.shard.grows)}
        found, sections = self.fingerprint(recipe, inputs)
        recorded = recipe.model_dump(mode="json")
        return Job(self.name, found, root, recorded, dict(inputs), sections, dict(tracking or {}))


def side_job(
    name: str,
    version: int,
    recipe: Recipe,
    root: str,
    sections: Mapping[str, Any],
    inputs: Mapping[str, str],
    tracking: Mapping[str, str] | None = None,
) -> Job:
    """The job of an artifact beside the DAG (a judge, a trial, a page), which says itself what decides it.

    Arguments as :meth:`Stage.job`'s; sections: plain values that its fingerprint covers.
    """
    found = fingerprint(name, version, sections, inputs)
    recorded = recipe.model_dump(mode="json")
    return Job(name, found, root, recorded, dict(inputs), dict(sections), dict(tracking or {}))


def anew(job: Job) -> Job:
    """The same job for an artifact that is complete and to be replaced; it stays until its replacement is whole."""
    return replace(job, replaces=Context(job).artifact.mark())


def perform(stage: Stage, job: Job) -> Artifact:
    """Run a stage unless its artifact is already complete, and write the manifest last."""
    context = Context(job)
    while not context.is_done:
        with alone(context.artifact.uri), claimed(context.artifact, lambda: context.is_done) as claim:
            if claim is None or context.is_done:  # somebody else made it while we waited
                break
            context.artifact.settle()  # what a killed process had made whole
            if not context.is_done:
                _make(stage, Context(replace(job, claim={"number": claim.number, "token": claim.token})), claim)
    return context.artifact


def _make(stage: Stage, context: Context, claim: Claim) -> None:
    """Run the stage's function and write the manifest, unless another machine has taken the artifact over."""
    job, started = context.job, time.monotonic()
    try:
        outcome = stage.run(context)
    except Exception as error:
        with suppress(Unreachable):
            if _lost(claim):  # what it met may be the other's
                return
        mistake = next((cause for cause in causes(error) if type(cause) in (UserError, Unreachable)), None)
        if mistake is None:
            raise
        raise type(mistake)(f"stage {stage.name}: {mistake}") from None
    seconds = time.monotonic() - started
    manifest = Manifest(
        stage=stage.name,
        stage_version=stage.version,
        fingerprint=job.fingerprint,
        recipe=job.recipe,
        sections=job.sections,
        inputs=job.inputs,
        files=tuple(outcome.files),
        rows=outcome.rows,
        facts=outcome.facts,
        scores=outcome.scores,
        seconds=seconds,
        created=timestamp(),
        libraries=library_versions(),
        runs={key: value for key, value in job.tracking.items() if key != "uri"},
    )
    if _lost(claim):
        return
    if job.replaces:
        context.artifact.replace(manifest)
    elif not context.artifact.complete(manifest):
        return
    context.tracker.metrics(manifest.figures)


def _lost(claim: Claim) -> bool:
    """Whether another machine has taken the artifact over, which is said. Raises as :meth:`Claim.held`."""
    if claim.held():
        return False
    say(f"{claim.storage.url} was taken over by another machine, for this one was silent: waiting for it", "warning")
    return True


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error that stopped a stage, and all that Ray wrapped in it."""
    seen: set[int] = set()
    queue: list[BaseException] = [error]
    while queue:
        current = queue.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        wrapped = [getattr(current, "cause", None), current.__cause__]
        wrapped += list(getattr(current, "worker_failures", {}).values())
        queue += [each for each in wrapped if isinstance(each, BaseException)]


def _without_places(data: dict[str, Any]) -> dict[str, Any]:
    """The data section without where the images lie: their identity is in `external`."""
    source = {key: value for key, value in data["source"].items() if key != "path" and not key.endswith("_path")}
    return {**data, "source": source}
