"""What nodes cost while they start and idle, in a small course of stages reckoned by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from configs.cluster import Cluster, load_cluster
from tasks.plan.waits import HEAD_STARTS, Nodes


@pytest.fixture
def cluster() -> Cluster:
    """Nodes start in 180 s, idle for 300 s, and cost a dollar an hour, those that train ten."""
    found = load_cluster("aws")
    pools = {name: pool.model_copy(update={"dollars_per_hour": 1.0}) for name, pool in found.pools.items()}
    pools["train"] = pools["train"].model_copy(update={"dollars_per_hour": 10.0})
    return found.model_copy(update={"pools": pools})


def _run(nodes: Nodes, stage: str, used: Mapping[str, int], seconds: float, gpu: bool = True) -> tuple[float, float]:
    """Seconds that a stage waits for its first pool, and that this starts early."""
    start = nodes.start(next(iter(used), "head"), gpu)
    nodes.work(stage, used, seconds, start)
    return start.seen, start.early


def _in_hours(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: pytest.approx(each / 3600) for stage, each in seconds.items()}


def test_what_starts_and_idles_is_paid_for(cluster: Cluster) -> None:
    nodes = Nodes(cluster, lead=180.0)
    assert _run(nodes, "shard", {"decode": 4}, 1000.0, gpu=False) == (180.0, 0.0), "nothing is there"
    assert _run(nodes, "encode", {"infer": 2, "decode": 1}, 100.0) == (HEAD_STARTS, 180.0), "while shard works"
    assert _run(nodes, "train_dit", {"train": 1}, 5000.0) == (180.0, 0.0), "encode ends before a node has started"
    assert _run(nodes, "sample", {"infer": 2}, 400.0) == (HEAD_STARTS, 180.0)
    assert _run(nodes, "evaluate", {"infer": 1}, 50.0) == (HEAD_STARTS, 0.0), "the same nodes"
    assert _run(nodes, "report", {}, 30.0) == (HEAD_STARTS, 0.0)
    nodes.end()
    beside = {
        "shard": 0.0,  # encode goes on with its nodes
        "encode": 2 * 180.0 + (2 + 1) * 300.0,
        "train_dit": 10 * 300.0,
        "sample": 2 * 180.0,
        "evaluate": 300.0,
    }
    assert dict(nodes.beside) == _in_hours(beside)
    within = {"shard": 4 * 180.0, "encode": 2 * HEAD_STARTS, "train_dit": 10 * 180.0, "sample": 2 * HEAD_STARTS}
    waits = {stage: each + within.get(stage, 0.0) for stage, each in beside.items()}
    assert dict(nodes.waits) == _in_hours(waits)


@pytest.mark.parametrize(("lead", "seen", "early"), [(0.0, 180.0, 0.0), (60.0, 120.0, 60.0), (240.0, 30.0, 240.0)])
def test_the_next_stages_nodes_start_as_early_as_the_recipe_says(
    cluster: Cluster, lead: float, seen: float, early: float
) -> None:
    nodes = Nodes(cluster, lead)
    _run(nodes, "shard", {"decode": 1}, 1000.0, gpu=False)
    assert _run(nodes, "encode", {"infer": 1}, 100.0) == (seen, early)


def test_nodes_that_are_wanted_soon_are_kept(cluster: Cluster) -> None:
    """They idle until then, and start no more."""
    nodes = Nodes(cluster, lead=180.0)
    _run(nodes, "sample", {"infer": 3}, 1000.0)
    _run(nodes, "report", {}, 120.0)
    assert _run(nodes, "evaluate", {"infer": 3}, 60.0) == (HEAD_STARTS, 0.0)
    nodes.end()
    assert nodes.beside == _in_hours({"sample": 3 * 120.0, "evaluate": 3 * 300.0})


def test_one_machine_waits_for_nothing_that_is_paid_for() -> None:
    nodes = Nodes(load_cluster("one_gpu"), lead=180.0)
    assert _run(nodes, "encode", {}, 1000.0) == (HEAD_STARTS, 0.0)
    nodes.end()
    assert not nodes.waits and not nodes.beside
