"""`ray up` and the autoscaler that it leaves on the head, driven without machines.

What Ray would send to a machine goes to a stand-in that writes it down and answers as a machine would. The nodes are a
provider's: the cloud's own over a mocked interface, or one in memory.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import yaml
from ray.autoscaler.node_provider import NodeProvider

from tests.helpers.cluster_files import INFRA

VALUES = {
    "REPLACE-ACCOUNT": "123456789012",
    "REPLACE-BUCKET": "artifacts",
    "REPLACE-IMAGES": "images",
    "REPLACE-PROJECT": "project",
    "REPLACE-IMAGE": "machine",
    "REPLACE-SUBNET": "private",
    "REPLACE-HEAD": "10.0.0.1",
    "REPLACE-WORKER": "10.0.0.2",
    "REPLACE-USER": "ubuntu",
}


def filled_in(name: str, values: dict[str, str]) -> dict[str, Any]:
    """A file for `ray up` with a person's values in it."""
    text = (INFRA / "ray" / f"{name}.yaml").read_text()
    for old, new in sorted({**VALUES, **values}.items(), key=lambda item: -len(item[0])):
        text = text.replace(old, new)
    assert "REPLACE" not in re.sub(r"#.*", "", text), "a value nobody was told to fill in"
    config: dict[str, Any] = yaml.safe_load(text)
    return config


class Machines:
    """Stands in for `subprocess`, as Ray's updater uses it: every machine has Docker and NVIDIA's toolkit.

    gpus: addresses of the machines on which `nvidia-smi` finds something.
    """

    def __init__(self, gpus: set[str] | None = None) -> None:
        self.gpus: Any = gpus or set()
        self.sent: list[tuple[str, str]] = []
        """Address and command, in order, as the machine's shell gets it."""
        self.bootstrap: dict[str, Any] = {}
        """What the head's autoscaler is given."""

    def check_call(self, command: list[str], *_: Any, **__: Any) -> int:
        self._answer(command)
        return 0

    call = check_call

    def check_output(self, command: list[str], *_: Any, **__: Any) -> bytes:
        return self._answer(command)

    def to(self, address: str) -> list[str]:
        return [command for place, command in self.sent if place == address]

    def docker_run(self, address: str) -> list[str]:
        """Words of the one command that starts the machine's container."""
        (found,) = [command for command in self.to(address) if command.startswith("docker run")]
        return shlex.split(found)

    def started(self, address: str) -> list[str]:
        """What is run inside the container to start Ray, in order."""
        inside = [shlex.split(each) for each in self.to(address) if each.startswith("docker exec")]
        scripts = [shlex.split(words[words.index("-c") + 1])[-1] for words in inside if "-c" in words]
        return [script.partition("&& (")[2].removesuffix(")") for script in scripts if "&& (" in script]

    def _answer(self, command: list[str]) -> bytes:
        if command[0] == "rsync":
            source, target = command[-2:]
            if Path(source).name.startswith("ray-bootstrap-"):
                self.bootstrap = json.loads(Path(source).read_text())
            self.sent.append((_address(target.partition(":")[0]), f"rsync {source} {target}"))
            return b""
        place = next(number for number, word in enumerate(command) if re.fullmatch(r"[\w-]+@[\d.]+", word))
        address, words = _address(command[place]), command[place + 1 :]
        script = words[-1] if words else ""
        if words[:1] == ["bash"]:
            (script,) = shlex.split(script)
            script = script.partition("&& (")[2].removesuffix(")")
        self.sent.append((address, script))
        if script == "nvidia-smi" and address not in self.gpus:
            raise subprocess.CalledProcessError(9, command)
        return next((answer for part, answer in _ANSWERS.items() if part in script), b"")


_ANSWERS = {
    "command -v docker": b"/usr/bin/docker",
    ".Config.Env": b'["PATH=/usr/local/bin:/usr/bin", "HOME=/home/ray"]',
    "printenv HOME": b"/home/ray",
    ".Runtimes": b"map[nvidia:{nvidia-container-runtime []} runc:{runc []}]",
    "/proc/meminfo": b"MemAvailable: 33554432 kB",
}


def _address(target: str) -> str:
    return target.rpartition("@")[2]


class Rented(NodeProvider):  # type: ignore[misc]  # Ray has no types
    """Nodes in memory: created at once, each at the next address."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.nodes: dict[str, dict[str, str]] = {}

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        return [node for node, tags in self.nodes.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self.nodes

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self.nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self.nodes[node_id]

    def internal_ip(self, node_id: str) -> str:
        return node_id

    external_ip = internal_ip

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        for _ in range(count):
            self.nodes[f"10.0.0.{len(self.nodes) + 1}"] = dict(tags)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self.nodes[node_id] |= tags

    def terminate_node(self, node_id: str) -> None:
        del self.nodes[node_id]


def start_head(config: dict[str, Any], provider: Any, machines: Machines) -> str:
    """What `ray up` does once its file is read; the head's address."""
    from ray.autoscaler._private.commands import get_or_create_head_node

    get_or_create_head_node(config, "cluster.yaml", False, False, True, None, _provider=provider, _runner=machines)
    (head,) = provider.non_terminated_nodes({"ray-node-type": "head"})
    address: str = provider.internal_ip(head)
    return address


def start_worker(kind: str, provider: Any, machines: Machines, head: str) -> str:
    """What the head's autoscaler does for one node of a kind, told what `ray up` told it; the node's address.

    This is Ray's second autoscaler, which `ray up` starts unless told otherwise.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance

    config = AutoscalingConfig(_as_on_the_head(machines), skip_content_hash=True)
    config._runtime_hash = config._file_mounts_contents_hash = "0"
    before = set(provider.non_terminated_nodes({}))
    tags = {"ray-node-type": "worker", "ray-user-node-type": kind, "ray-node-name": kind, "ray-node-status": "new"}
    provider.create_node(machines.bootstrap["available_node_types"][kind]["node_config"], tags, 1)
    (node,) = set(provider.non_terminated_nodes({})) - before
    address: str = provider.internal_ip(node)
    if machines.bootstrap["available_node_types"][kind]["resources"].get("GPU"):
        machines.gpus.add(address)
    instance = Instance(instance_type=kind, cloud_instance_id=node)
    RayInstaller(provider, config, machines).install_ray(instance, head)
    return address


def start_on_demand(demands: list[dict[str, int]], machines: Machines, head: str) -> list[str]:
    """The nodes that Ray's first autoscaler starts on the head for such demands; their addresses."""
    import time

    from ray.autoscaler._private.autoscaler import StandardAutoscaler
    from ray.autoscaler._private.load_metrics import LoadMetrics

    config = _as_on_the_head(machines)
    config["provider"] = {**config["provider"], "foreground_node_launch": True}
    load = LoadMetrics()
    load.update(head, b"head", {"CPU": 4}, {"CPU": 4}, 0)
    load.set_resource_requests(demands)
    scaler = StandardAutoscaler(lambda: config, load, MagicMock(), process_runner=machines, update_interval_s=0)
    until = time.monotonic() + 60
    while time.monotonic() < until:
        scaler.update()
        nodes = scaler.provider.non_terminated_nodes({"ray-node-type": "worker"})
        if len(nodes) >= len(demands) and len(scaler.num_successful_updates) == len(nodes):
            for updater in scaler.updaters.values():
                updater.join(30)
            return [scaler.provider.internal_ip(node) for node in nodes]
        time.sleep(0.05)
    raise AssertionError(f"{len(nodes)} nodes for {demands}, failed: {dict(scaler.num_failed_updates)}")


def _as_on_the_head(machines: Machines) -> dict[str, Any]:
    """Its autoscaler's configuration, with the files that lie there taken from this test's home folder."""
    mounts = machines.bootstrap["file_mounts"]
    here = {there: os.path.expanduser(f"~/{there.partition('/ray/')[2]}") for there in mounts}
    return {**machines.bootstrap, "file_mounts": here}
