"""A race: variants of one recipe on equal budgets and seeds, and how they compare on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from prefect import flow, task

from configs import Recipe, UserError
from configs.cluster import load_cluster
from configs.compute import ActorCompute
from configs.race import Race, load_race
from configs.section import fingerprinted
from flows.publish import publish
from flows.run import Run, preflight_storage
from flows.stages import STAGES, encode, shard, train_dit, train_semvae, train_vavae
from flows.tracked import flow_run_id, tracked
from infra import stopping, tracking
from infra.artifacts import Artifact
from infra.progress import Bar
from tasks import snapshots
from tasks.comparing import comparison
from tasks.comparing.comparison import Axis, ComparedRun, FurtherTable
from tasks.comparing.ledger import Standard, as_table, image_ratios, ledger, ratios_as_table
from tasks.comparing.trial import SHEET, Snapshot, TrainingActor, TrialActor, trial_job
from tasks.data.actors import spread
from tasks.scoring.distances import score_name
from tasks.scoring.real_images import RealImages, ScoringInputs, real_images
from tasks.sources import one_look
from tasks.stage import Context, Job
from tasks.training.flops import flops_per_image
from tasks.training.metrics import PROCESSOR_SECONDS, SECONDS

PAGE = "race.html"
_SHARED = (shard, train_vavae, train_semvae, encode)
_CLOCKS = {"seconds": (SECONDS, "seconds"), "processor_seconds": (PROCESSOR_SECONDS, "processor seconds")}


@dataclass(frozen=True)
class Entry:
    """One variant with one seed."""

    variant: str
    seed: int
    recipe: Recipe = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.variant} seed {self.seed}"


class Racing:
    """A race under way. Everything it makes is an artifact, so that a race that was stopped goes on where it was and
    one with a variant more trains that variant alone.
    """

    def __init__(
        self, race: Race, entries: Sequence[Entry], root: str, tracker: tracking.Tracker, prefect_flow_run: str
    ) -> None:
        self.race, self.entries, self.root, self.tracker = race, entries, root, tracker
        self._flow_run = prefect_flow_run
        self._inputs: dict[str, dict[str, Artifact]] = {}
        self._models: dict[Entry, Artifact] = {}
        self._runs: dict[Entry, tracking.Tracker] = {}
        self._trials: dict[Entry, list[tuple[int, Artifact]]] = {}
        self._real: RealImages | None = None

    def prepare(self) -> None:
        """Shards, tokenizers, latents, and what is found out about real images; each once, whoever shares it."""
        made: dict[tuple[str, str], Artifact] = {}
        for entry in self.entries:
            if entry.variant in self._inputs:
                continue
            run = self._run(entry)
            inputs: dict[str, Artifact] = {}
            for stage in (stage for stage in _SHARED if stage.present(entry.recipe)):
                given = [inputs[name] for name in stage.inputs if name in inputs]
                artifact, _ = run.plan(stage, given)
                key = (stage.name, artifact.fingerprint)
                inputs[stage.name] = made[key] if key in made else made.setdefault(key, run(stage, *given))
            self._inputs[entry.variant] = inputs
        first = self.entries[0]
        shards = self._inputs[first.variant].get("shard")  # none beside ready latents
        self._real = real_images(ScoringInputs(first.recipe, self.root, shards))
        if self.race.ledger is not None and self._real.judge is None:
            raise UserError(
                f"race {self.race.name}: ledger goes by class consistency, which is left out without a judge that "
                "labels evaluate.classifier.min_accuracy of the test split right: lower that, give it more "
                "evaluate.classifier.epochs, or leave ledger out"
            )

    def train(self) -> None:
        """All entries: side by side in actors, as many as `compute.actors.actors`, where one worker trains each; else
        one after the other, each by the stage's own workers.
        """
        small: list[Job] = []
        for entry in self.entries:
            run = self._run(entry)
            latents = self._inputs[entry.variant]["encode"]
            model, job = run.plan(train_dit, [latents])
            self._models[entry] = model
            self._runs[entry] = self._entry_run(entry, model)
            if model.is_complete():
                continue
            if entry.recipe.compute.train.workers == 1:
                tracked = {**asdict(self._runs[entry]), "prefect_flow_run": self._flow_run}
                small.append(Job(**{**asdict(job), "tracking": tracked}))
            else:
                run(train_dit, latents)
        compute = self.entries[0].recipe.compute
        actors = ActorCompute(
            actors=compute.actors.actors,
            cpus_per_actor=compute.train.cpus_per_worker,
            gpus_per_actor=compute.train.gpus_per_worker,
        )
        run_jobs(
            "train", TrainingActor, small, actors, sum(e.recipe.train_dit.images for e in self.entries[: len(small)])
        )

    def score(self) -> None:
        """Every entry at every point, in one job whose actors keep what trials share."""
        assert self._real is not None, "prepare comes first"
        jobs: list[Job] = []
        for entry in self.entries:
            inputs = {**self._inputs[entry.variant], "train_dit": self._models[entry]}
            for images_seen in snapshots.taken_at(self._models[entry], self.race.average):
                at = Snapshot(images_seen, self.race.average)
                job = trial_job(entry.recipe, self.root, inputs, self._real, at)
                jobs.append(job)
                self._trials.setdefault(entry, []).append((images_seen, Context(job).artifact))
        missing = [job for job in jobs if not Context(job).artifact.is_complete()]
        run_jobs("score", TrialActor, missing, self.entries[0].recipe.compute.actors, len(missing) * self._images)
        for entry, trials in self._trials.items():
            run = self._runs[entry]
            run.series(
                [(name, value, images) for images, made in trials for name, value in made.manifest.scores.items()]
            )
            run.file(SHEET, trials[-1][1].read(SHEET))
            run.finish()

    def report(self) -> Artifact:
        """The table, the charts and the page, in an artifact and in the race's MLflow run."""
        assert self._real is not None, "prepare comes first"
        found = [self._standing(entry) for entry in self.entries]
        recipe, sweep = self.entries[0].recipe, self.race.sweep
        facts, tables = self._ledger(found, recipe.evaluate.features.label)
        inputs = {
            f"{e.name} {images}": made.fingerprint for e, trials in self._trials.items() for images, made in trials
        }
        sections = {"race": fingerprinted(self.race)}
        written = partial(
            comparison.write,
            page_name=PAGE,
            title=self.race.title or self.race.name,
            lead=f"{len(self.race.variants)} variants × {len(self.race.seeds)} seeds; each trains on "
            f"{recipe.train_dit.images:,} images and is scored {self.race.points} times by {self._images:,} samples.",
            compared_runs=found,
            network=recipe.evaluate.features.label,
            floor=self._real.floor,
            details={"The race": sections["race"]},
            seconds=f"{_CLOCKS[self.race.clock][1]} of training",
            axis=None if sweep is None else Axis(sweep.label, {name: (x, "") for name, x in sweep.values.items()}),
            tables=tables,
            facts=facts,
        )
        return publish("race", written, self.root, recipe, sections, inputs, self.tracker)

    def abandon(self) -> None:
        """Entries are not left as if they still ran."""
        for run in self._runs.values():
            with suppress(Exception):  # MLflow may be what failed
                run.finish("KILLED" if stopping.asked() else "FAILED")

    # ------------------------------------------------------------------------------------------------ parts

    def _run(self, entry: Entry) -> Run:
        return Run(
            entry.recipe, self.root, STAGES, None, None, frozenset(), self.tracker, prefect_flow_run=self._flow_run
        )

    @property
    def _images(self) -> int:
        return self.entries[0].recipe.sample.images

    def _entry_run(self, entry: Entry, model: Artifact) -> tracking.Tracker:
        """The MLflow run of an entry: its training's curves, where it trains now, and its scores."""
        tags = {
            "stage": "train_dit",
            "fingerprint": model.fingerprint,
            "variant": entry.variant,
            "prefect_flow_run": self._flow_run,
        }
        run = tracking.start_run(entry.recipe.tracking.experiment, entry.name, tags, parent=self.tracker)
        run.params({"variant": entry.variant, "seed": entry.seed, "train_dit": entry.recipe.section("train_dit")})
        return run

    def _ledger(self, found: Sequence[ComparedRun], network: str) -> tuple[dict[str, Any], list[FurtherTable]]:
        """For the artifact's manifest, and for the page."""
        asked = self.race.ledger
        if asked is None:
            return {}, []
        cluster = load_cluster(asked.cluster)
        pool = cluster.pools[cluster.pool("decode")]
        price = pool.dollars_per_hour / pool.cpus
        by = Standard(asked.baseline, ("class_consistency", score_name("frechet", network)), price / 3600)
        lines, ratios = ledger(found, by), image_ratios(found, by)
        told = f"{price:.3g} dollars an hour, a processor of {pool.machine} ({cluster.sources.prices})"
        facts = {"ledger": [asdict(line) for line in lines], "image_ratios": ratios}
        return facts, [as_table(lines, by, told), ratios_as_table(ratios, by)]

    def _standing(self, entry: Entry) -> ComparedRun:
        model, trials = self._models[entry], self._trials[entry]
        clock = model.manifest.facts["curves"][_CLOCKS[self.race.clock][0]]
        passed = comparison.interpolated([images for images, _ in trials], clock)
        network = entry.recipe.evaluate.features.label
        last = trials[-1][1]
        curves = {
            score: [(i, t, made.manifest.scores[score]) for (i, made), t in zip(trials, passed, strict=True)]
            for score in comparison.chosen_scores(list(last.manifest.scores), network)
        }
        return ComparedRun(
            entry.variant,
            last.manifest.scores,
            entry.seed,
            curves,
            figures={
                "images_per_second": trials[-1][0] / passed[-1],
                "training_teraflops": (flops_per_image(entry.recipe, "train_dit") or 0.0) * trials[-1][0] / 1e12,
            },
            intervals=last.manifest.facts["intervals"],
            sheet=last.read(SHEET),
            facts={"model": model.uri, "mlflow": self._runs[entry].run},
        )


@task(name="race step", task_run_name="{what}")
def run_jobs(what: str, worker: type, jobs: list[Job], actors: ActorCompute, images: int) -> None:
    """Every job by one pool of actors."""
    with Bar(what, images) as bar:
        for rows in spread([asdict(job) for job in jobs], worker, (), actors):
            bar.advance(rows)


@contextmanager
def open_race(
    name: str, overrides: Sequence[str], root: str | None, seeds: Sequence[int] | None = None
) -> Iterator[Racing]:
    """Everything a race needs around its steps; what can be refused is refused here, before any starts.

    seeds: instead of the race's own.
    """
    race, entries = entries_of(name, overrides, seeds)
    first = entries[0].recipe
    storage = preflight_storage(root)
    for entry in entries:
        for stage in STAGES:
            if stage.external is not None and stage.present(entry.recipe) and entry.seed == entries[0].seed:
                stage.external(entry.recipe)
    tags = {"flow": "race", "race": race.name, "root": storage.url}
    with tracked(first.tracking.experiment, f"race {race.name}", tags) as parent:
        parent.params({"race": race.model_dump(mode="json", exclude={"variants", "common"}), "common": race.common})
        racing = Racing(race, entries, storage.url, parent, flow_run_id())
        try:
            yield racing
        except BaseException:
            racing.abandon()
            raise


def entries_of(name: str, overrides: Sequence[str], seeds: Sequence[int] | None) -> tuple[Race, list[Entry]]:
    """The race and its entries, one seed after the other, so that an interrupted race has whole seeds to show.

    Raises:
        UserError: a variant that is impossible, or that is scored otherwise than the others; a ledger by prices that
            nobody states.
    """
    race = load_race(name)
    if seeds:
        race = race.model_copy(update={"seeds": tuple(seeds)})
    if race.ledger is not None:
        load_cluster(race.ledger.cluster)  # its prices are asked for at the end, after hours
    entries = [Entry(v, seed, race.entry(v, seed, overrides)) for seed in race.seeds for v in race.variants]
    first = entries[0]
    for entry in entries:
        for what, ours, others in _scored_by(entry.recipe, first.recipe):
            if ours != others:
                raise UserError(
                    f"race {race.name}: {what} of variant {entry.variant} is not that of {first.variant}, so their "
                    "scores would not compare: set it in common"
                )
    return race, entries


def _scored_by(one: Recipe, other: Recipe) -> list[tuple[str, Any, Any]]:
    sections: list[Mapping[str, Any]] = [recipe.model_dump(mode="json") for recipe in (one, other)]
    named = [(name, *(section[name] for section in sections)) for name in ("data", "image", "shard", "evaluate")]
    return [*named, ("sample.images", one.sample.images, other.sample.images)]


@flow(name="race", flow_run_name="{race}")
def race(
    race: str = "fashion_mnist",
    overrides: list[str] | None = None,
    root: str | None = None,
    seeds: list[int] | None = None,
) -> str:
    """Train and score all variants of a race, reusing whatever is there. Returns the URI of its artifact.

    Args:
        race: a race's name or a path to a YAML file (`configs/race.py`).
        overrides: `section.field=value` strings laid upon the recipe of every variant.
        root: where artifacts live, a folder or a bucket URL; None is this machine's default.
        seeds: instead of the race's own.
    """
    with one_look(), open_race(race, overrides or [], root, seeds) as racing:
        racing.prepare()
        racing.train()
        racing.score()
        return racing.report().uri
