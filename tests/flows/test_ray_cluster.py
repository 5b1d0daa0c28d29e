"""What spot machines, people and an autoscaler do to runs on several Ray nodes. Slow: whole flows, one by one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flows.stages import STAGES
from infra.artifacts import Artifact
from tests.flows.conftest import REPOSITORY, Workplace
from tests.flows.test_deployment import _post
from tests.flows.test_ray_jobs import start
from tests.helpers.nodes import RayNodes, ray_nodes, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

CODE = f"compute.cluster.code={REPOSITORY}"
"""Nodes of one machine share a folder for what is sent along, and unpack into each other's: they take it from here."""
LONG = ("train_dit.images=200000", "compute.train.checkpoint_every=3200")
"""Longer than anybody waits: for runs that are stopped."""
RECEIPT, CHECKPOINT = "encode/*/receipts/**/*.json", "train_dit/*/checkpoints/*/complete.json"
"""What there is once something could be lost."""
PATIENTLY = {"seconds": 900.0, "pause": 1.0}
ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@pytest.fixture
def nodes(finished: Workplace) -> Iterator[RayNodes]:
    with ray_nodes(finished.environment) as cluster:
        yield cluster


@pytest.fixture
def there(finished: Workplace, nodes: RayNodes, tmp_path: Path) -> Workplace:
    """A root of its own whose stages go to the cluster."""
    environment = {**finished.environment, **nodes.environment}
    return replace(finished, root=str(tmp_path / "artifacts"), environment=environment)


# --------------------------------------------------------------------------------------------------- nodes that die


def test_the_whole_flow_from_a_worker_while_nodes_die(finished: Workplace, there: Workplace, nodes: RayNodes) -> None:
    """A node dies in `encode` and one in `train_dit`; nobody can tell from what is made."""
    for _ in range(2):
        nodes.add(num_cpus=2)
    flow = deploy(there, nodes, "compute.train.checkpoint_every=32")
    lose_a_node(there, nodes, flow, "Encoder", RECEIPT)
    lose_a_node(there, nodes, flow, "TrainWorker", CHECKPOINT)
    wait_until(lambda: ended(there, flow), "the flow ended", **PATIENTLY)
    said = logged(there, flow)
    assert state(there, flow) == "COMPLETED", said[-4000:]
    assert "going on from the checkpoint" in said, "lines of workers on other nodes reach Prefect's log"
    assert _post(there, "artifacts/filter"), "progress is beside the log"
    for stage, fingerprint in finished.first.items():
        made, undisturbed = (Artifact(f"file://{each.root}", stage, fingerprint) for each in (there, finished))
        assert made.manifest.rows == undisturbed.manifest.rows, stage
        if stage in ("shard", "train_vavae", "train_semvae", "encode", "train_dit", "sample"):
            assert made.manifest.files == undisturbed.manifest.files, stage
    stages = {stage.name for stage in STAGES} & finished.first.keys()
    assert sorted(name.split("-")[1] for name in nodes.jobs()) == sorted(stages), "a job each"


def lose_a_node(there: Workplace, nodes: RayNodes, flow: str, work: str, begun: str) -> None:
    """Kill a node that does this work as soon as it has something to lose; another comes for it."""
    stage = begun.split("/")[0]
    wait_until(lambda: has(there, stage) or ended(there, flow), f"{stage} had its turn", **PATIENTLY)
    wait_until(lambda: has(there, begun), f"{stage} had something to lose")  # it is over soon: no other questions
    nodes.kill(nodes.holding(work)[0])
    nodes.add(num_cpus=2)


def test_a_notice_saves_before_the_node_goes(
    finished: Workplace, there: Workplace, nodes: RayNodes, tmp_path: Path
) -> None:
    """Nothing is saved but for the notice; training goes on elsewhere from where it was, which is no failure."""
    one = nodes.add(num_cpus=2)
    shutil.copytree(finished.undisturbed, there.root)
    log = tmp_path / "flow.log"
    never = ("train_dit.images=400000", "compute.train.checkpoint_every=400000", "compute.train.max_failures=0")
    command = start(there, "--only", "train_dit", *settings(CODE, *never), log=log)
    wait_until(lambda: " images  " in log.read_text() or command.poll() is not None, "it trained", 900)
    nodes.add(num_cpus=2)
    nodes.warn(one, 30)
    wait_until(lambda: has(there, CHECKPOINT) or command.poll() is not None, "it saved")
    at = newest(there)
    wait_until(lambda: "going on from" in log.read_text() or command.poll() is not None, "it went on elsewhere")
    assert f"going on from the checkpoint at {at:,} images" in log.read_text(), log.read_text()[-4000:]
    nodes.kill(one)
    (job,) = nodes.running()
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=120) != 0
    gone(nodes, job)
    assert newest(there) > at, "it went on training"


# ------------------------------------------------------------------------------------------------- people who stop it


def test_a_cancelled_flow_leaves_nothing_running(finished: Workplace, there: Workplace, nodes: RayNodes) -> None:
    nodes.add(num_cpus=2)
    shutil.copytree(finished.undisturbed, there.root)
    flow = deploy(there, nodes, *LONG)
    wait_until(lambda: has(there, CHECKPOINT) or ended(there, flow), "it trained", **PATIENTLY)
    (job,) = nodes.running()
    prefect(there, "flow-run", "cancel", flow)
    wait_until(lambda: ended(there, flow), "the flow ended", **PATIENTLY)
    assert state(there, flow) == "CANCELLED"
    gone(nodes, job)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_leaves_nothing_running(
    finished: Workplace, there: Workplace, nodes: RayNodes, sign: signal.Signals
) -> None:
    """And what training saved is where the next run goes on."""
    nodes.add(num_cpus=2)
    shutil.copytree(finished.undisturbed, there.root)
    command = start(there, "--only", "train_dit", *settings(CODE, *LONG))
    wait_until(lambda: bool(nodes.running()) and has(there, CHECKPOINT), "it trained", 900)
    (job,) = nodes.running()
    before = newest(there)
    command.send_signal(sign)
    assert command.wait(timeout=120) != 0
    gone(nodes, job)
    assert newest(there) >= before
    assert not has(there, "train_dit/*/requests/*"), "nothing is left that would stop the next run"


def gone(nodes: RayNodes, job: str) -> None:
    wait_until(lambda: not nodes.running(), "the job ended")
    assert nodes.jobs()[job]["status"] == "STOPPED"
    wait_until(lambda: not nodes.drivers(), "its driver ended", 30)
    wait_until(lambda: not nodes.ask("demand")["busy"], "everything it reserved was free", 60)


def newest(workplace: Workplace) -> int:
    return max(int(path.parent.name) for path in Path(workplace.root).glob(CHECKPOINT))


# -------------------------------------------------------------------------------------------- a cluster that grows


def test_what_an_autoscaler_is_asked_for(finished: Workplace, there: Workplace, nodes: RayNodes) -> None:
    """Stages wait without nodes, their demand is there to be seen, and they go on as nodes come and go."""
    shutil.copytree(finished.undisturbed, there.root)
    encode = start(there, "--only", "encode", "--force", "encode", "--set", CODE)
    wait_until(lambda: bool(nodes.ask("demand")["waiting"]), "actors asked for CPUs")
    assert all(0 < each["CPU"] <= 1 for each in nodes.ask("demand")["waiting"])
    assert not nodes.ask("demand")["busy"], "nothing is held by whoever waits"
    first = nodes.add(num_cpus=2)
    anew = RECEIPT.replace("encode/*", "encode/*.new")  # beside the one that was there
    wait_until(lambda: has(there, anew) or encode.poll() is not None, "it began")
    second = nodes.add(num_cpus=2)
    nodes.kill(first)
    assert encode.wait(timeout=300) == 0, "it went on where there was room"
    nodes.kill(second)

    train = start(there, "--only", "train_dit", "--force", "train_dit", "--set", CODE)
    wait_until(lambda: bool(nodes.ask("demand")["gangs"]), "training asked for its gang")
    (gang,) = nodes.ask("demand")["gangs"]
    assert [bundle["CPU"] for bundle in gang] == [1.0, 1.0]
    nodes.add(num_cpus=1)
    wait_until(lambda: any("CPU" in each for each in nodes.ask("demand")["nodes"].values()), "one CPU came")
    assert nodes.ask("demand")["gangs"] and not nodes.ask("demand")["busy"], "half a gang holds nothing"
    nodes.add(num_cpus=1)
    assert train.wait(timeout=300) == 0
    wait_until(lambda: not nodes.ask("demand")["busy"], "idle nodes are free to go", 60)


# ---------------------------------------------------------------------------------------------------------- helpers


def has(workplace: Workplace, pattern: str) -> bool:
    return any(Path(workplace.root).glob(pattern))


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def prefect(workplace: Workplace, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "prefect"), *arguments]
    environment = {**os.environ, **workplace.environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=True).stdout


def deploy(workplace: Workplace, nodes: RayNodes, *overrides: str) -> str:
    """Have the worker run the deployment `sfd-full/demo-tiny` with stages on the cluster; the flow run's id."""
    parameters = json.dumps({"root": workplace.root, "overrides": [CODE, *overrides]})
    reach = f"env={json.dumps(dict(nodes.environment))}"
    prefect(workplace, "deployment", "run", "sfd-full/demo-tiny", "--params", parameters, "--job-variable", reach)
    (flow,) = [
        run["id"] for run in _post(workplace, "flow_runs/filter") if run["parameters"].get("root") == workplace.root
    ]
    return str(flow)


def state(workplace: Workplace, flow: str) -> str:
    (run,) = _post(workplace, "flow_runs/filter", {"flow_runs": {"id": {"any_": [flow]}}})
    return str(run["state"]["type"])


def ended(workplace: Workplace, flow: str) -> bool:
    return state(workplace, flow) in ENDS


def logged(workplace: Workplace, flow: str) -> str:
    """What the flow and its stages logged at Prefect's server."""
    lines: list[dict] = []
    page: list[dict] = [{}]
    while page:
        body = {"offset": len(lines), "logs": {"flow_run_id": {"any_": [flow]}}, "sort": "TIMESTAMP_ASC"}
        page = _post(workplace, "logs/filter", body)
        lines += page
    return "\n".join(line["message"] for line in lines)
