"""One run of a flow: fingerprints, selection, tracking, and the Prefect task that performs a stage."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.states import Cancelled
from prefect.tasks import exponential_backoff
from prefect.transactions import get_transaction

from configs import Recipe, UserError, load_recipe
from configs.naming import run_name
from flows import shown
from flows.ahead import needed_next
from flows.tracked import STOPS, flow_run_id, tracked
from infra import jobs, stopping, tracking
from infra.artifacts import Artifact
from infra.home import default_root
from infra.integrity import require_unchanged, require_whole
from infra.inventory import RUN_FILE
from infra.locks import alone
from infra.logs import Line
from infra.progress import Bytes
from infra.storage import Storage
from tasks.sources import one_look
from tasks.stage import Context, Job, Stage, anew, perform


def _fingerprint_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"{parameters['job']['stage']}-{parameters['job']['fingerprint']}"


def _may_help(task: Any, run: Any, state: Any) -> bool:
    """Whether another attempt may get further: not on a person's mistake, nor on a defect of ours."""
    return isinstance(state.result(raise_on_failure=False), jobs.JobLost)


@task(
    name="stage",
    cache_policy=CacheKeyFnPolicy(cache_key_fn=_fingerprint_key),
    persist_result=True,
    retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=15),
    retry_jitter_factor=0.5,
    retry_condition_fn=_may_help,
)
def _perform(stage: Stage, job: dict[str, Any]) -> str:
    """Prefect's view of a stage: cached under the artifact's fingerprint, which is also its result."""
    try:
        return _made(stage, Context(Job(**job)))
    except STOPS as stop:
        if not stopping.asked():  # Prefect's worker knows whether it cancelled or lost this process
            raise
        transaction = get_transaction()
        if transaction is not None:
            transaction.write_on_commit = False  # else the state would be what the cache remembers
        _stops.append(stop)
        return Cancelled(message="It was asked to stop.")  # type: ignore[return-value]  # the task's state


_stops: list[BaseException] = []
"""The interruption of a task, which tells Prefect that it is cancelled, for its flow to raise."""


def _made(stage: Stage, context: Context) -> str:
    artifact, cluster = context.artifact, context.recipe.compute.cluster
    if context.is_done:
        return perform(stage, context.job).fingerprint
    teller = _Teller()
    here = jobs.address(cluster) is None
    with shown.moving(stage.name, stage.share(context) if here or stage.trains else teller.share):
        if here:
            return perform(stage, context.job).fingerprint
        jobs.run(artifact, json.dumps(asdict(context.job)).encode(), cluster, teller)
    return artifact.manifest.fingerprint


class _Teller:
    """Lines of a job into Prefect's log of the stage; how far they say that it is."""

    def __init__(self) -> None:
        self._logger = get_run_logger()
        self._share: float | None = None

    def share(self) -> float | None:
        return self._share

    def __call__(self, line: Line) -> None:
        level = logging.getLevelNamesMapping().get(line.level.upper(), logging.INFO)
        self._logger.log(level, "%s", line.message)
        images, total = line.fields.get("images"), line.fields.get("total")
        if images and total:
            self._share = images / total


@dataclass
class Run:
    """Call it with a stage and its input artifacts; it gives back the stage's artifact, made or reused."""

    recipe: Recipe
    root: str
    stages: tuple[Stage, ...]
    start: str | None
    only: str | None
    force: frozenset[str]
    tracker: tracking.Tracker
    prefect_flow_run: str
    notes: list[str] = field(default_factory=list)
    uri: str = ""
    """Of the last artifact that was made or reused."""

    def __call__(self, stage: Stage, *inputs: Artifact | None) -> Artifact:
        """Perform `stage` on `inputs`.

        An input that the recipe has no stage for is None and left out; a stage that the recipe does not have
        gives None itself.
        """
        if stopping.asked():  # while the last stage was just ending
            raise stopping.Stopped(stopping.asked(), f"the end of {Path(self.uri).parent.name}")
        if not stage.present(self.recipe) or self._beyond(stage):
            return None  # type: ignore[return-value]  # flows read as if every recipe had every stage
        given = [artifact for artifact in inputs if artifact is not None]
        artifact, job = self.plan(stage, given)
        if not self._selected(stage):
            return artifact
        for needed in given:
            if not needed.is_complete():
                with alone(needed.uri):
                    needed.settle()
            if not needed.is_complete():
                raise UserError(
                    f"stage {stage.name} needs {needed.uri}, which is not complete: "
                    f"run without --only, or with --from {needed.stage}"
                )
        complete = artifact.is_complete()
        if stage.name in self.force and complete:
            job, complete = anew(job), False
        job = replace(job, following=needed_next(stage, self._after(stage, job), self.recipe))
        used = [artifact] if complete else given
        require_whole({each: self._selected_name(each.stage) for each in used})
        with self._noted(stage, job):
            self._perform(stage, artifact, job, complete)
        self.uri = artifact.uri
        return artifact

    def all(self) -> str:
        """Every selected stage in order; the URI of the last one made or reused."""
        made: dict[str, Artifact] = {}
        for stage in self.stages:
            artifact = self(stage, *(made.get(name) for name in stage.inputs))
            if artifact is not None:
                made[stage.name] = artifact
        return self.uri

    # ------------------------------------------------------------------------------------------------ parts

    def plan(self, stage: Stage, inputs: Sequence[Artifact]) -> tuple[Artifact, Job]:
        """The artifact a stage would make, and the job that makes it: a pure function of recipe and inputs."""
        prints = {artifact.stage: artifact.fingerprint for artifact in inputs}
        job = stage.job(self.recipe, self.root, prints)
        return Context(job).artifact, job

    def _selected(self, stage: Stage) -> bool:
        return _selected(stage, self.stages, self.start, self.only)

    def _beyond(self, stage: Stage) -> bool:
        """Whether it follows the only stage that is asked for: what it is given from outside is nobody's matter."""
        names = [each.name for each in self.stages]
        return self.only is not None and names.index(stage.name) > names.index(self.only)

    def _selected_name(self, name: str) -> bool:
        return any(each.name == name and self._selected(each) for each in self.stages)

    def _after(self, stage: Stage, job: Job) -> list[Stage]:
        """The stages that will be performed once this one is."""
        names = [each.name for each in self.stages]
        later = self.stages[names.index(stage.name) + 1 :]
        later = tuple(each for each in later if self._selected(each) and each.present(self.recipe))
        return [each for each in later if not job.replaces or each.name in self.force]

    @contextmanager
    def _noted(self, stage: Stage, job: Job) -> Iterator[None]:
        """While a stage is made anew, what a command needs to go on with that."""
        if job.replaces:
            names = [each.name for each in self.stages]
            left = [name for name in names[names.index(stage.name) :] if name in self.force]
            forced = " ".join(f"--force {name}" for name in left)
            stopping.note_options(f"--from {stage.name}" if self.start else forced)
        yield
        stopping.note_options("")

    def _perform(self, stage: Stage, artifact: Artifact, job: Job, complete: bool) -> None:
        logger, out = get_run_logger(), Context(job).out
        child = self._begun_run(out) if complete else self._child_run(stage, artifact, out, job)
        if child is not None:
            job = Job(**{**asdict(job), "tracking": {**asdict(child), "prefect_flow_run": self.prefect_flow_run}})
        if not complete:
            logger.info("running %s → %s", stage.name, out.url)
        perform_stage = _perform.with_options(
            name=stage.name, task_run_name=f"{stage.name} {artifact.fingerprint}", refresh_cache=not complete
        )
        try:
            perform_stage(stage, asdict(job))
            if _stops:
                raise _stops.pop()
        except BaseException as error:
            if child is not None:
                with suppress(Exception):  # MLflow may be what failed; the first error is the one to tell
                    child.finish("KILLED" if isinstance(error, STOPS) else "FAILED")
            raise
        if child is not None:
            if complete:  # its job outlived the flow, or died between the manifest and MLflow
                child.metrics(artifact.manifest.figures)
            child.finish()
            artifact.storage.delete(RUN_FILE)
            artifact.storage.delete(jobs.DESCRIPTION)
        manifest = artifact.manifest
        self.tracker.tag(**{f"stage.{stage.name}": f"{'cached' if complete else 'made'} {artifact.fingerprint}"})
        self.tracker.metrics(shown.counting(stage.name, manifest.scores))
        logger.info(
            "%s %s: %s rows, %.0f s",
            "reused" if complete else "made",
            stage.name,
            f"{manifest.rows:,}",
            manifest.seconds,
        )

    def _begun_run(self, out: Storage) -> tracking.Tracker | None:
        """The MLflow run that an earlier attempt at what is made here began and did not end, open again."""
        if not out.exists(RUN_FILE):
            return None
        known = json.loads(out.read_bytes(RUN_FILE))
        child = tracking.Tracker.of(known)
        return child if child.uri == self.tracker.uri and child.reopen() else None

    def _child_run(self, stage: Stage, artifact: Artifact, out: Storage, job: Job) -> tracking.Tracker:
        """The stage's MLflow run; an interrupted stage goes on in the run it began.

        The record beside the artifact also says what the stage reads, so that nobody deletes it meanwhile.
        """
        child = self._begun_run(out) or self._new_run(stage, artifact)
        reads = {"inputs": job.inputs, "sections": job.sections}
        out.write_bytes(RUN_FILE, json.dumps({**asdict(child), **reads}).encode())
        return child

    def _new_run(self, stage: Stage, artifact: Artifact) -> tracking.Tracker:
        tags = {"stage": stage.name, "fingerprint": artifact.fingerprint, "prefect_flow_run": self.prefect_flow_run}
        child = tracking.start_run(self.recipe.tracking.experiment, stage.name, tags, parent=self.tracker)
        values = self.recipe.model_dump(mode="json")
        child.params({name: values[name] for name in stage.sections})
        return child


def _selected(stage: Stage, stages: Sequence[Stage], start: str | None, only: str | None) -> bool:
    if only is not None:
        return stage.name == only
    if start is not None:
        names = [each.name for each in stages]
        return names.index(stage.name) >= names.index(start)
    return True


@contextmanager
def open_run(
    flow: str,
    stages: tuple[Stage, ...],
    recipe: str,
    overrides: Sequence[str],
    root: str | None,
    start: str | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
) -> Iterator[Run]:
    """Everything a flow needs around its stages; what can be refused is refused here, before any starts."""
    with one_look():
        loaded, storage = preflight(stages, recipe, overrides, root, start, only, force)
        redone = set(force)
        if start is not None:
            names = [stage.name for stage in stages]
            redone |= set(names[names.index(start) :])
        name = run_name(recipe, overrides)
        tags = {"flow": flow, "recipe": loaded.name, "root": storage.url, "overrides": " ".join(overrides)}
        changed = shown.differing(recipe, list(overrides))
        tags |= {f"changed.{field}": value for field, value in changed.items()}  # to search by
        on_cluster = jobs.address(loaded.compute.cluster) is not None
        with tracked(loaded.tracking.experiment, name, tags, on_cluster) as parent:
            parent.params(loaded.model_dump(mode="json"), first=changed)
            run = Run(loaded, storage.url, stages, start, only, frozenset(redone), parent, flow_run_id())
            yield run
            if run.uri:
                shown.conclude(run.uri, name, parent, flow_run_id())


def preflight(
    stages: tuple[Stage, ...],
    recipe: str,
    overrides: Sequence[str],
    root: str | None,
    start: str | None = None,
    only: str | None = None,
    force: Sequence[str] = (),
    verify: bool = False,
) -> tuple[Recipe, Storage]:
    """Check a run's parameters, its storage, its outside sources, and what the stages that will run are given.

    verify: read all files of the artifacts that the run would use, too.

    Raises:
        UserError: naming the parameter, what was found and what would be right.
    """
    loaded = load_recipe(recipe, overrides)
    for stage in stages:
        loaded.require(stage.sections, f"stage {stage.name}")
    names = [stage.name for stage in stages]
    for option, chosen in (("--from", start), ("--only", only), *(("--force", name) for name in force)):
        if chosen is not None and chosen not in names:
            raise UserError(f"{option} {chosen}: no such stage; there are {', '.join(names)}")
    if start is not None and only is not None:
        raise UserError("--from and --only exclude each other: choose one")
    storage = preflight_storage(root)
    jobs.check(loaded.compute.cluster)
    from tasks.foreign.hubs import check_hubs
    from tasks.networks import check_foundation

    made: dict[str, Artifact] = {}
    used: list[Stage] = []
    remade: set[str] = set()
    for stage in (each for each in stages if each.present(loaded)):
        outside = None if stage.external is None else stage.external(loaded)
        known = replace(stage, external=partial(_known, outside))  # a source is listed once
        prints = {name: made[name].fingerprint for name in stage.inputs if name in made}
        made[stage.name] = Context(known.job(loaded, storage.url, prints)).artifact
        redone = stage.name in force or start is not None
        runs = _selected(stage, stages, start, only) and (redone or not made[stage.name].is_complete())
        if runs:
            used += [each for each in stages if each.name in prints and each.name not in remade]
            remade.add(stage.name)
        elif _selected(stage, stages, start, only):
            used.append(stage)
        if stage.check is not None and runs:
            stage.check(loaded)
        if "foundation" in stage.sections and runs:
            check_foundation(loaded)
        if stage.name == only:
            break
    check_hubs(loaded, remade)
    whole = {made[each.name]: _selected(each, stages, start, only) for each in used}
    require_whole(whole)
    if verify:
        total = sum(each.manifest.size for each in whole if each.is_complete())
        with Bytes("verify", total) as bar:
            require_unchanged(whole, bar.read)
    return loaded, storage


def _known(outside: Mapping[str, str] | None, recipe: Recipe) -> Mapping[str, str] | None:
    return outside


def preflight_storage(root: str | None) -> Storage:
    """Where artifacts go. Raises UserError where nothing can be written."""
    storage = Storage.at(root or default_root())
    storage.check_writable()
    return storage
