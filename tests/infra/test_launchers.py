"""What `ray up` and its autoscaler send to machines, up to the last command: containers get their GPUs, and say so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cloud_accounts import replay_on_aws
from tests.helpers.clouds import Machines, Rented, filled_in, start_head, start_on_demand, start_worker
from tests.helpers.cluster_files import CLOUDS, INFRA

AWS = {"ami-REPLACE": "ami-1", "subnet-REPLACE": "subnet-1", "sg-REPLACE": "sg-1"}


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An operator's home folder with Ray's token in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr("ray.autoscaler._private.updater.READY_CHECK_INTERVAL", 0.01, raising=False)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    (tmp_path / ".ssh").mkdir()
    for key in (tmp_path / ".ssh" / "key", tmp_path / "ray_bootstrap_key.pem"):  # the other as it lies on the head
        key.write_text("key")
    return tmp_path


def _prepared(name: str, home: Path) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(filled_in(name, AWS))
    validate_config(config)
    config["auth"]["ssh_private_key"] = str(home / ".ssh" / "key")
    return dict(config)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_containers_are_given_the_gpus_that_ray_announces(cloud: str, operator: Path) -> None:
    config = _prepared(cloud, operator)
    provider, machines = Rented(config["provider"], "latentforge"), Machines()
    head = start_head(config, provider, machines)
    for kind in ("decode", "infer", "train"):
        gpus = config["available_node_types"][kind]["resources"].get("GPU", 0)
        address = start_worker(kind, provider, machines, head)
        check_container(machines.docker_run(address), gpus > 0)
        check_start(machines.started(address), gpus, head)


def check_container(run: list[str], gpus: bool) -> None:
    """The container of a node: all its GPUs or none, the driver's libraries, the local disk, no public ports."""
    assert ("--gpus" in run and run[run.index("--gpus") + 1] == "all") is gpus
    assert ("--runtime=nvidia" in run) is gpus
    assert ("NVIDIA_DRIVER_CAPABILITIES=compute,utility" in run) is gpus
    assert run[run.index("--volume") + 1] == "/local:/local"
    assert [word for word in run if word.startswith("registry.example.com/latentforge:")]


def check_start(started: list[str], gpus: int, head: str) -> None:
    """The node looks for its GPUs before it joins, as many as Ray is told to announce."""
    checks = [number for number, command in enumerate(started) if "python -m infra.gpus" in command]
    joins = [
        number for number, command in enumerate(started) if f"RAY_HEAD_IP={head}" in command and "ray start" in command
    ]
    assert len(checks) == len(joins) == 1 and checks < joins
    for number in (*checks, *joins):
        assert (f'"GPU":{gpus}' in started[number]) is (gpus > 0) and "RAY_OVERRIDE_RESOURCES" in started[number]


def test_rented_machines_start_as_one_cluster(operator: Path) -> None:
    """Ray's provider of given addresses: no announced numbers, so that one GPU at least is asked for."""
    config = _prepared("ssh", operator)
    provider, machines = Rented(config["provider"], "latentforge"), Machines({"10.0.0.1", "10.0.0.2"})
    head = start_head(config, provider, machines)
    machines.bootstrap["provider"]["type"] = "local"
    address = start_worker("local.cluster.node", provider, machines, head)
    for place in (head, address):
        check_container(machines.docker_run(place), gpus=True)
        started = machines.started(place)
        check, join = (next(n for n, each in enumerate(started) if part in each) for part in (".gpus 1", "ray start"))
        assert check < join


@pytest.mark.parametrize("name", (*CLOUDS, "ssh"))
def test_the_head_brings_servers_and_what_starts_other_nodes(name: str, operator: Path) -> None:
    """Prefect and MLflow beside Ray; the token and the key that the autoscaler hands on; ssh for it in the image."""
    config = _prepared(name, operator)
    provider, machines = Rented(config["provider"], "latentforge"), Machines({"10.0.0.1"} if name == "ssh" else set())
    head = start_head(config, provider, machines)
    (serve,) = [each for each in machines.started(head) if "latentforge serve" in each]
    assert "--listen" in serve and serve.endswith("&") and "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265" in serve
    copied = [each.split()[-1] for each in machines.to(head) if each.startswith("rsync ")]
    assert [each for each in copied if each.endswith("/home/ray/.ray/auth_token")]
    assert [each for each in copied if each.endswith("/ray_bootstrap_key.pem")]
    dockerfile = (INFRA / "container" / "Dockerfile").read_text()
    installed = next(line for line in dockerfile.splitlines() if "apt-get install" in line).split()
    assert {"openssh-client", "rsync"} <= set(installed)
    if name != "ssh":
        check_container(machines.docker_run(head), gpus=False)


def test_a_node_without_its_gpus_does_not_join(operator: Path) -> None:
    class Blind(Machines):
        def _answer(self, command: list[str]) -> bytes:
            answer = super()._answer(command)
            if "python -m infra.gpus" in self.sent[-1][1]:
                raise subprocess.CalledProcessError(1, command)
            return answer

    config = _prepared("aws", operator)
    provider, machines = Rented(config["provider"], "latentforge"), Blind()
    head = start_head(config, provider, machines)
    with pytest.raises(Exception, match="update-failed"):
        start_worker("train", provider, machines, head)
    (address,) = machines.gpus
    assert not [each for each in machines.started(address) if "ray start" in each]


# ------------------------------------------------------------------------------------------- a machine's own commands


@pytest.mark.parametrize(
    ("disks", "used", "mounted", "expected"),
    [
        (["/dev/nvme1n1", "/dev/nvme2n1"], [], False, ["/dev/nvme1n1", "/dev/nvme2n1"]),
        (["/dev/nvme1n1", "/dev/nvme2n1"], ["/dev/nvme1n1"], False, ["/dev/nvme2n1"]),
        (["/dev/nvme1n1"], [], True, None),
        ([], [], False, None),
    ],
)
def test_local_disks_of_aws_become_one_volume(
    tmp_path: Path, disks: list[str], used: list[str], mounted: bool, expected: list[str] | None
) -> None:
    listed = "\n".join(
        ["/dev/nvme0n1 Amazon Elastic Block Store"] + [f"{d} Amazon EC2 NVMe Instance Storage" for d in disks]
    )
    busy = "|".join(used) or "none"
    _program(
        tmp_path,
        "lsblk",
        f'case "$*" in -dpno*) printf "%s\\n" "{listed}";; *{busy}) echo nvme lvm;; *) echo nvme;; esac',
    )
    _program(tmp_path, "mountpoint", f"exit {0 if mounted else 1}")
    _program(tmp_path, "sudo", f'echo "$*" >> {tmp_path}/done')
    (command,) = filled_in("aws", AWS)["initialization_commands"]
    subprocess.run(["bash", "-c", command], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    done = (tmp_path / "done").read_text().splitlines()
    arrays = [line.split() for line in done if line.startswith("mdadm")]
    assert done[0] == "mkdir -p /local" and done[-1] == "chown 1000:1000 /local"
    if expected is None:
        assert not arrays and len(done) == 2
    else:
        assert arrays[0][-len(expected) :] == expected and f"--raid-devices={len(expected)}" in arrays[0]
        assert done[2:4] == ["mkfs.ext4 -q /dev/md0", "mount /dev/md0 /local"]


def _program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


# ------------------------------------------------------------------------------------------------- mocked clouds


@pytest.mark.slow
def test_on_a_mocked_aws(operator: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EC2 and IAM as moto plays them: the account is made by our script, machines by Ray, within our policy."""
    import botocore.client
    from moto import mock_aws

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        import boto3
        from ray.autoscaler._private.commands import _bootstrap_config
        from ray.autoscaler._private.providers import _get_node_provider

        ec2 = boto3.client("ec2", region_name="us-east-1")
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=network, CidrBlock="10.0.0.0/24", AvailabilityZone="us-east-1a")["Subnet"]
        group = ec2.create_security_group(GroupName="closed", Description="closed", VpcId=network)["GroupId"]
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="artifacts")
        replay_on_aws(tmp_path)
        values = {
            "ami-REPLACE": ec2.describe_images()["Images"][0]["ImageId"],
            "subnet-REPLACE": subnet["SubnetId"],
            "sg-REPLACE": group,
        }
        config = _bootstrap_config(filled_in("aws", values), no_config_cache=True)
        assert ec2.describe_security_groups()["SecurityGroups"][-1]["GroupId"] == group, "Ray made none of its own"
        provider, machines = _get_node_provider(config["provider"], "latentforge"), Machines()
        head = start_head(config, provider, machines)
        asked: set[str] = set()
        call = botocore.client.BaseClient._make_api_call

        def noted(client: Any, operation: str, given: Any) -> Any:
            asked.add(f"{client.meta.service_model.service_name}:{operation}")
            return call(client, operation, given)

        monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", noted)
        for kind, gpus in (("decode", 0), ("infer", 1), ("train", 8)):
            address = start_worker(kind, provider, machines, head)
            check_container(machines.docker_run(address), gpus > 0)
            check_start(machines.started(address), gpus, head)
        for node in provider.non_terminated_nodes({"ray-node-type": "worker"}):
            provider.terminate_node(node)
        monkeypatch.undo()
        machines_there = [each for r in ec2.describe_instances()["Reservations"] for each in r["Instances"]]
        kinds = {each["InstanceType"]: each for each in machines_there}
        assert set(kinds) == {"m6i.2xlarge", "m6id.4xlarge", "g6.2xlarge", "p5.48xlarge"}
        assert kinds["m6i.2xlarge"]["State"]["Name"] == "running" and "PublicIpAddress" not in kinds["m6i.2xlarge"]
        assert {each["State"]["Name"] for name, each in kinds.items() if name != "m6i.2xlarge"} <= {"terminated"}
    policy = json.loads((INFRA / "policies" / "autoscaler-aws.json").read_text())
    allowed = {action for each in policy["Statement"] for action in _listed(each["Action"])}
    assert asked <= allowed, "the head's role would be refused"
    assert allowed - asked <= {"iam:PassRole", "ec2:DescribeInstanceStatus", "ec2:DescribeTags"}


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.mark.slow
def test_on_a_mocked_gcp(operator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute Engine's own client and description: every machine is one that there could be, and gets its GPUs."""
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    from tests.helpers.google import Google

    google = Google().installed(monkeypatch)
    monkeypatch.setattr("ray.autoscaler._private.gcp.node.POLL_INTERVAL", 0)
    given = filled_in("gcp", {})
    given["auth"]["ssh_private_key"] = str(operator / ".ssh" / "key")
    config = _bootstrap_config(given, no_config_cache=True)
    provider, machines = _get_node_provider(config["provider"], "latentforge"), Machines()
    head = start_head(config, provider, machines)
    (start,) = [each for each in machines.started(head) if "ray start" in each]
    assert "RAY_enable_autoscaler_v2=0 ray start" in start, "the second one takes every node of GCP for failed"
    machines.gpus = google
    demands = {
        "n2-standard-16": (0, {"CPU": 16}),
        "g2-standard-8": (1, {"CPU": 4, "GPU": 1}),
        "a3-highgpu-8g": (8, {"CPU": 64, "GPU": 8}),
    }
    start_on_demand([each for _, each in demands.values()], machines, head)
    for machine, (gpus, _) in demands.items():
        (address,) = google.addresses(machine)
        check_container(machines.docker_run(address), gpus > 0)
        check_start(machines.started(address), gpus, head)
    for node in provider.non_terminated_nodes({"ray-node-type": "worker"}):
        provider.terminate_node(node)
    assert len(google.deleted) == 3 and not google.rights_changed
    by_type = {each["machineType"].rpartition("/")[2]: each for each in google.machines.values()}
    assert set(by_type) == {"n2-standard-8", "n2-standard-16", "g2-standard-8", "a3-highgpu-8g"}
    for name, each in by_type.items():
        boot = next(disk for disk in each["disks"] if disk.get("boot"))
        assert boot["initializeParams"]["diskType"].endswith("/pd-balanced"), "standard disks do not go with GPUs"
        assert "accessConfigs" not in each["networkInterfaces"][0]
        if name.startswith(("g2", "a3")):
            assert each["scheduling"]["onHostMaintenance"] == "TERMINATE", "machines with GPUs do not move"
    email = {name: each["serviceAccounts"][0]["email"].partition("@")[0] for name, each in by_type.items()}
    assert email.pop("n2-standard-8") == "latentforge-head" and set(email.values()) == {"latentforge-node"}
