"""MLflow behind one small object: a stage logs to its run, or to nothing when it has none."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.addresses import refuse_credentials
from infra import logs, servers
from infra.home import home


def tracking_uri() -> str:
    """Where runs go: MLFLOW_TRACKING_URI, or SQLite in the project's home folder.

    Raises:
        UserError: the address holds credentials; it is kept beside unfinished artifacts and handed to jobs.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    refuse_credentials(
        "MLFLOW_TRACKING_URI",
        uri,
        "start `mlflow server` on that database and name the server; its own credentials go into "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )
    return uri


def reader() -> Any:
    """A client for commands that look at what is there.

    Raises:
        UserError: no server answers, which MLflow's own client would find out in minutes.
    """
    from mlflow import MlflowClient

    uri = tracking_uri()
    servers.check_mlflow(uri)
    return MlflowClient(tracking_uri=uri)


@dataclass(frozen=True)
class Tracker:
    """One MLflow run, by plain values; `run` empty drops everything (a stage outside a flow)."""

    uri: str = ""
    run: str = ""

    @classmethod
    def of(cls, tracking: Mapping[str, str]) -> Tracker:
        return cls(tracking.get("uri", ""), tracking.get("run", ""))

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri, "run": self.run}

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log figures at a step (images seen) in one request."""
        self.series([(name, value, step) for name, value in values.items()])

    def series(self, points: list[tuple[str, float, int]]) -> None:
        """Log many (name, value, step) points in as few requests as MLflow allows (1,000 each)."""
        if not self.run or not points:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(_clean(name), float(value), now, step) for name, value, step in points]
        for start in range(0, len(entries), 1000):
            self._client.log_batch(self.run, metrics=entries[start : start + 1000])

    def params(self, values: Mapping[str, Any], first: Collection[str] = ()) -> None:
        """Log nested plain values as flat `section.field` parameters, in an order that pages keep."""
        if not self.run:
            return
        from mlflow.entities import Param

        entries = [Param(name, text[:6000]) for name, text in _flatten(values, "")]
        entries.sort(key=lambda each: each.key not in first)
        for start in range(0, len(entries), 100):
            self._client.log_batch(self.run, params=entries[start : start + 100])

    def tag(self, **tags: str) -> None:
        if self.run:
            for name, value in tags.items():
                self._client.set_tag(self.run, name, value)

    def file(self, name: str, data: bytes) -> None:
        """Attach a small file (a grid, a report) under its name."""
        if not self.run:
            return
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(data)
            parent = str(Path(name).parent)
            self._client.log_artifact(self.run, str(path), None if parent == "." else parent)

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """Attach a table, which the MLflow UI shows and joins with those of other runs."""
        if self.run:
            self._client.log_table(self.run, dict(columns), name)

    def last_step(self, name: str) -> int | None:
        """The step of the newest point of a curve; None where there is none yet."""
        if not self.run:
            return None
        points = self._client.get_metric_history(self.run, _clean(name))
        return max((point.step for point in points), default=None)

    def seen_of(self, images: int) -> float | None:
        """The share of a training's images that its workers told of; None where they told of none yet."""
        step = self.last_step("images_per_second")
        return None if step is None else step / images

    def reopen(self) -> bool:
        """Go on in a run that was interrupted; False where the server knows none of that name (any more)."""
        from mlflow.exceptions import MlflowException

        try:
            if self.run:
                self._client.update_run(self.run, status="RUNNING")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the other: deleted
                raise
            return False
        return True

    def running_children(self) -> list[Tracker]:
        """Runs of its stages that have not ended."""
        experiment = self._client.get_run(self.run).info.experiment_id
        mine = f"tags.`mlflow.parentRunId` = '{self.run}' and attributes.status = 'RUNNING'"
        return [Tracker(self.uri, found.info.run_id) for found in self._client.search_runs([experiment], mine)]

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.time() - self._client.get_run(self.run).info.start_time / 1000

    def page(self, file: str = "") -> str:
        """Where MLflow's pages show the run, or a file of it, below the address of their server; as a training."""
        experiment = self._client.get_run(self.run).info.experiment_id
        place = f"/artifacts/{file}" if file else ""
        return f"#/experiments/{experiment}/runs/{self.run}{place}?{_READ}"

    def finish(self, status: str = "FINISHED") -> None:
        if self.run:
            self._client.set_terminated(self.run, status)


def start_run(experiment: str, name: str, tags: Mapping[str, str], parent: Tracker | None = None) -> Tracker:
    """Open a run (a child of `parent` where given) in an experiment that is made when missing."""
    from mlflow import MlflowClient

    uri = parent.uri if parent else tracking_uri()
    client = MlflowClient(tracking_uri=uri)
    experiment_id = _experiment(client, experiment, uri)
    all_tags = dict(tags)
    if parent:
        all_tags["mlflow.parentRunId"] = parent.run
    run = client.create_run(experiment_id, run_name=name, tags=all_tags)
    tracker = Tracker(uri, run.info.run_id)
    if parent is None:
        _of_this_process.append(tracker)
    return tracker


_of_this_process: list[Tracker] = []


def own_run() -> Tracker | None:
    """The run of this process's flow, for a command to point to; None where it ran none."""
    return _of_this_process[-1] if _of_this_process else None


_READ = "workflowType=machine_learning"
"""Part of an address at which MLflow's pages show trainings. Without it they show what their reader's switch says,
which stands on traces of agents at first."""
_TRAINING = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "Trainings: turn the switch above from GenAI to **Model training**.",
}
"""What an experiment is of, and how to find it."""


def front_page(server: str) -> str:
    """Where a server's pages begin, as for trainings."""
    return f"{server.rstrip('/')}/#/experiments?{_READ}"


def _experiment(client: Any, name: str, uri: str) -> str:
    """The experiment's id; made when missing, and brought back where somebody deleted it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if uri.startswith("http") else (home() / "mlruns").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=_TRAINING))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
        logs.say(f"MLflow's experiment {name} had been deleted: restored it", "warning")
    return str(found.experiment_id)


@dataclass(frozen=True)
class FoundRun:
    """A run of a flow that led to scores."""

    id: str
    name: str
    root: str
    evaluation: str
    """Fingerprint of its `evaluate` artifact."""


def evaluated_runs() -> list[FoundRun]:
    """Runs of flows that led to scores, in all experiments, the newest first."""
    client = reader()
    experiments = [each.experiment_id for each in client.search_experiments()]
    found, token = list[FoundRun](), None
    while experiments:
        page = client.search_runs(
            experiments, "tags.root != ''", max_results=1000, order_by=["start_time DESC"], page_token=token
        )
        for run in page:
            tags, info = run.data.tags, run.info
            if "stage.evaluate" in tags:
                made = tags["stage.evaluate"].split()[-1]
                found.append(FoundRun(info.run_id, info.run_name or "", tags["root"], made))
        token = page.token
        if not token:
            break
    return found


def run_tags(run: str) -> dict[str, str] | None:
    """Tags of a run; None where there is no such run."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(reader().get_run(run).data.tags)
    except MlflowException:
        return None


def _flatten(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{name}.")
        else:
            flat.append((name, value if isinstance(value, str) else json.dumps(value)))
    return flat


def _clean(name: str) -> str:
    """MLflow allows letters, digits, `_`, `-`, `.`, space and `/` in a metric's name."""
    return "".join(c if c.isalnum() or c in "_-. /" else "-" for c in name)
