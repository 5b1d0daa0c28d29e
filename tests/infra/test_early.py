"""Machines of the next stage: when they are asked for, and that nothing stays asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import early
from tests.flows.conftest import REPOSITORY
from tests.helpers.nodes import ray_nodes, wait_until

WORKERS = [{"CPU": 8.0, "GPU": 1.0}] * 2


class Group:
    """A placement group that is fulfilled when a test says so."""

    def __init__(self) -> None:
        self.fulfilled = threading.Event()
        self.asked: list[tuple[list[dict[str, float]], str]] = []
        self.removed = threading.Event()

    def wait(self, seconds: float) -> bool:
        return self.fulfilled.wait(seconds)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    made = Group()

    def ask(bundles: list[dict[str, float]], strategy: str) -> Group:
        made.asked.append((bundles, strategy))
        return made

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.placement_group", ask)
    monkeypatch.setattr("ray.util.remove_placement_group", lambda found: found.removed.set())
    monkeypatch.setattr(early, "_LOOK_SECONDS", 0.01)
    return made


def _steady(seconds: float, at_first: float = 0.0) -> Callable[[], float]:
    """Work that takes so many seconds from now, some of which was done before."""
    began = time.monotonic()
    return lambda: min(1.0, at_first + (1.0 - at_first) * (time.monotonic() - began) / seconds)


def test_machines_are_asked_for_when_the_end_is_as_near_as_they_take(group: Group) -> None:
    share = _steady(2.0, at_first=0.5)  # an earlier attempt's half says nothing of the rate
    with early.started_early(WORKERS, share, lead=1.0):
        while not group.asked:
            assert share() < 1.0, "never asked for"
            time.sleep(0.005)
        assert 0.7 <= share() <= 0.85
        assert group.asked == [(WORKERS, "PACK")]
        assert not group.removed.is_set(), "it is what an autoscaler sees"
        group.fulfilled.set()
        assert group.removed.wait(5), "once fulfilled it holds nothing"


def test_a_look_that_fails_is_not_the_last(group: Group) -> None:
    share, failed = _steady(2.0), list[int]()

    def away_at_first() -> float:
        if len(failed) < 3:
            failed.append(1)
            raise ConnectionError("MLflow is away")
        return share()

    with early.started_early(WORKERS, away_at_first, lead=1.5):
        while not group.asked:
            assert share() < 1.0, "never asked for"
            time.sleep(0.005)
        group.fulfilled.set()


def test_what_never_came_is_asked_for_no_more_once_the_stage_ends(group: Group) -> None:
    with pytest.raises(RuntimeError), early.started_early(WORKERS, _steady(0.5), lead=100.0):
        while not group.asked:
            time.sleep(0.005)
        raise RuntimeError
    assert group.removed.is_set()


@pytest.mark.parametrize(
    ("bundles", "share", "lead"),
    [
        (WORKERS, lambda: None, 100.0),
        (WORKERS, lambda: 0.5, 100.0),
        (WORKERS, _steady(0.1), 0.0),
        ([], _steady(0.1), 9.0),
    ],
    ids=["unknown", "stands still", "switched off", "the same machines"],
)
def test_nothing_is_asked_for_without_an_end_in_sight(
    bundles: list[dict[str, float]], share: Callable[[], float | None], lead: float, group: Group
) -> None:
    with early.started_early(bundles, share, lead):
        time.sleep(0.15)
    assert not group.asked


def test_a_cluster_that_refuses_stops_no_stage(
    group: Group, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(bundles: object, strategy: str) -> Group:
        raise ValueError("no such resource")

    monkeypatch.setattr("ray.util.placement_group", refused)
    with early.started_early(WORKERS, _steady(0.2), lead=9.0):
        time.sleep(0.2)
    assert "cannot ask for the next stage's machines early: no such resource" in "".join(capsys.readouterr())


DRIVER = """
import time, ray
from infra.early import started_early
ray.init()
began = time.monotonic()
with started_early([{"CPU": 1, "GPU": 1}], lambda: min(1.0, (time.monotonic() - began) / 45.0), lead=30.0):
    time.sleep(45)
"""


@pytest.mark.slow
def test_rays_autoscaler_starts_the_next_stages_node_while_this_one_works() -> None:
    """And ends it when nobody came; the node says that it has a GPU."""
    from ray.job_submission import JobSubmissionClient

    with ray_nodes({}, pools={"infer": {"CPU": 1, "GPU": 1, "most": 1}}) as nodes:
        token = Path(nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        place = nodes.environment["RAY_API_SERVER_ADDRESS"]
        client = JobSubmissionClient(place, headers={"Authorization": f"Bearer {token}"})
        environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
        job = client.submit_job(entrypoint=f"python -c '{DRIVER}'", runtime_env=environment)

        def gpus() -> int:
            return sum("GPU" in each for each in nodes.ask("demand")["nodes"].values())

        wait_until(lambda: bool(gpus()) or not nodes.running(), "a node with a GPU came", 180)
        assert nodes.running() == [job], client.get_job_logs(job)[-2000:]
        wait_until(lambda: not nodes.ask("demand")["busy"], "what came is held by nobody", 60)
        assert not nodes.ask("demand")["gangs"]
        wait_until(lambda: not nodes.running(), "the stage ended", 120)
        assert nodes.jobs()[job]["status"] == "SUCCEEDED"
        wait_until(lambda: not gpus(), "the idle node went", 120)
