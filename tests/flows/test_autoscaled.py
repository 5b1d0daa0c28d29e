"""One seeded run as people pay for it: from a deployment, on nodes that Ray's own autoscaler starts
and ends, artifacts on an S3 server, curves on an MLflow server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from flows.stages import STAGES
from infra.artifacts import Artifact
from tests.flows.conftest import Workplace
from tests.flows.test_ray_cluster import deploy, ended, logged, state
from tests.helpers.nodes import RayNodes, ray_nodes, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

POOLS = {"work": {"CPU": 2, "most": 1}, "infer": {"CPU": 1, "GPU": 1, "most": 1}}
"""`infer` says that it has a GPU, which holds for what Ray does with it; networks run on its CPU."""
GPUS = ("compute.actors.gpus_per_actor=1",)


@dataclass
class Watch:
    """Which nodes there were beside which job, about every second."""

    seen: list[tuple[str, set[str]]] = field(default_factory=list)
    """The stage whose job runs, empty between stages, and the pools that have nodes."""

    def first(self, stage: str) -> int:
        return [at for at, _ in self.seen].index(stage)

    def last(self, stage: str) -> int:
        return max(number for number, (at, _) in enumerate(self.seen) if at == stage)

    def look(self, nodes: RayNodes) -> None:
        job = next(iter(nodes.running()), "")
        stage = job.split("-")[1] if job else ""
        there = nodes.ask("demand")["nodes"].values()
        kinds = {"infer" if "GPU" in each else "work" for each in there if each.get("CPU")}
        self.seen.append((stage, kinds))


@contextmanager
def watched(nodes: RayNodes) -> Iterator[Watch]:
    watch, over = Watch(), threading.Event()

    def follow() -> None:
        while not over.wait(1.0):
            watch.look(nodes)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def test_a_deployment_on_nodes_that_come_and_go(
    finished: Workplace, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    root = "s3://latents/autoscaled"
    with ray_nodes(finished.environment, pools=POOLS) as nodes:
        reach = {**nodes.environment, **s3_server}
        there = replace(finished, root=root, environment={**finished.environment, **reach})
        with watched(nodes) as watch:
            flow = deploy(there, replace(nodes, environment=reach), *GPUS)
            wait_until(lambda: ended(there, flow), "the flow ended", 1800, 1.0)
            said = logged(there, flow)
            assert state(there, flow) == "COMPLETED", said[-4000:]
            wait_until(lambda: not watch.seen[-1][1], "all idle nodes went", 120)
        jobs = nodes.jobs()
    stages = {stage.name for stage in STAGES} & finished.first.keys()
    assert sorted(name.split("-")[1] for name in jobs) == sorted(stages), "a job each"
    assert {job["status"] for job in jobs.values()} == {"SUCCEEDED"}
    _made_the_same(finished, root)
    _curves(finished, root)
    assert not watch.seen[0][1], "at first there is the head alone"
    between = watch.seen[watch.last("encode") : watch.first("sample")]
    assert [stage for stage, pools in between if "infer" not in pools], "an idle GPU goes"


def _made_the_same(finished: Workplace, root: str) -> None:
    """As a run on one machine and a folder makes it, byte by byte up to the samples."""
    for stage, fingerprint in finished.first.items():
        made, before = Artifact(root, stage, fingerprint), Artifact(f"file://{finished.root}", stage, fingerprint)
        assert made.manifest.rows == before.manifest.rows, stage
        if stage in ("shard", "train_vavae", "train_semvae", "encode", "train_dit", "sample"):
            assert made.manifest.files == before.manifest.files, stage


def _curves(finished: Workplace, root: str) -> None:
    """What workers on nodes that are gone told the MLflow server."""
    from mlflow import MlflowClient

    client = MlflowClient(finished.environment["MLFLOW_TRACKING_URI"])
    manifest = Artifact(root, "train_dit", finished.first["train_dit"]).manifest
    run = client.get_run(manifest.runs["run"])
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "images_per_second")
    assert max(point.step for point in points) == manifest.rows
