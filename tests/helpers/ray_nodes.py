"""A Ray cluster of several nodes on this machine: `python -m tests.helpers.ray_nodes FOLDER PORT CPUS [POOLS]`.

With POOLS, a JSON object of resources and `most` nodes by name, Ray's own autoscaler starts and ends nodes: processes
of this machine instead of a cloud's.

It reads one JSON object a line from stdin and answers with one: `{"add": {"num_cpus": 2}}`, `{"kill": node}`,
`{"warn": {"node": node, "seconds": 30}}`: its end is near, `{"holding": "Encoder"}`: nodes where this works,
`{"demand": true}`: what an autoscaler would see. At the end of stdin it ends its own nodes, and no other Ray on this
machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION, NodeStatus
from ray.util import get_node_ip_address

from benchmarks.s3_server import free_ports

IDLE_SECONDS = 15.0
OBJECT_STORE = 80 << 20
_NO_COMMANDS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
"""What Ray misses in a configuration, and nodes of this machine do without."""


class Nodes:
    def __init__(self, folder: Path, port: int, cpus: int, pools: dict[str, dict[str, float]]) -> None:
        head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        if pools:
            head |= _autoscaled(folder, pools)
        self._common = {
            "temp_dir": str(folder),
            "object_store_memory": OBJECT_STORE,
            "dashboard_agent_listen_port": None,
        }
        self._cluster = Cluster(True, head_node_args={"num_cpus": cpus, **head, **self._common})
        (folder / "ray_current_cluster").write_text(self._cluster.gcs_address)  # where the head's jobs look for it
        os.environ["RAY_ADDRESS"] = self._cluster.gcs_address  # and workers, which a machine of one Ray needs not tell
        self._nodes: dict[str, Any] = {}

    def add(self, arguments: dict[str, Any]) -> str:
        node = self._cluster.add_node(**arguments, **self._common)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def kill(self, node: str) -> str:
        """At once, as a machine dies: Ray alone would leave the node's workers a second to go on."""
        workers = self._workers(node)
        self._raylet(node).suspend()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)
        return node

    def holding(self, name: str) -> list[str]:
        """Nodes with a worker whose title, which Ray makes of what it does, has this in it."""
        found = []
        for node in self._nodes:
            for worker in self._workers(node):
                with suppress(psutil.Error):
                    if name in " ".join(worker.cmdline()):
                        found.append(node)
                        break
        return found

    def _raylet(self, node: str) -> psutil.Process:
        return psutil.Process(self._nodes[node].all_processes["raylet"][0].process.pid)

    def _workers(self, node: str) -> list[psutil.Process]:
        return self._raylet(node).children(recursive=True)

    def warn(self, arguments: dict[str, Any]) -> str:
        """What a cloud's notice comes to in Ray: no new work for the node, and word to those who work there."""
        end = int(1000 * (time.time() + arguments["seconds"]))
        gcs = GcsClient(address=self._cluster.gcs_address)
        taken, why = gcs.drain_node(arguments["node"], DRAIN_NODE_REASON_PREEMPTION, "a test's notice", end)
        assert taken, why
        return str(arguments["node"])

    def demand(self, _: Any) -> dict[str, Any]:
        """What an autoscaler would be asked for: requests that wait, each with how often, and gangs of them."""
        state = get_cluster_resource_state(GcsClient(address=self._cluster.gcs_address))
        waiting = [
            {**dict(each.request.resources_bundle), "count": each.count} for each in state.pending_resource_requests
        ]
        gangs = [
            [dict(bundle.resources_bundle) for bundle in gang.bundle_selectors[0].resource_requests]
            if gang.bundle_selectors
            else [dict(request.resources_bundle) for request in gang.requests]
            for gang in state.pending_gang_resource_requests
        ]
        alive = [each for each in state.node_states if each.status != NodeStatus.DEAD]
        nodes = {each.node_id.hex(): dict(each.total_resources) for each in alive}
        busy = [
            each.node_id.hex()
            for each in alive
            if each.total_resources.get("CPU", 0.0) != each.available_resources.get("CPU", 0.0)
        ]
        return {"waiting": waiting, "gangs": gangs, "nodes": nodes, "busy": busy}

    def end(self) -> None:
        self._cluster.shutdown()


def _autoscaled(folder: Path, pools: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Arguments of a head that starts nodes of these pools on demand and ends them when they idle."""
    (gcs,) = free_ports(1)
    kinds = {}
    for name, each in pools.items():
        resources = {key: value for key, value in each.items() if key != "most"}
        resources["object_store_memory"] = OBJECT_STORE
        kinds[name] = {"resources": resources, "node_config": {}, "max_workers": each["most"]}
    config = {
        "cluster_name": "of-this-machine",
        "max_workers": sum(each["most"] for each in pools.values()),
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "upscaling_speed": 100,
        "provider": {
            "type": "external",  # of its own type Ray looks for a file that its wheels lack
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": f"{get_node_ip_address()}:{gcs}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            **kinds,
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in _NO_COMMANDS},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "autoscaling.json"
    path.write_text(json.dumps(config))
    os.environ |= {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    return {"autoscaling_config": str(path), "gcs_server_port": gcs}


def main(folder: Path, port: int, cpus: int, pools: str = "{}") -> None:
    nodes = Nodes(folder, port, cpus, json.loads(pools))
    print(json.dumps({"ready": True}), flush=True)
    try:
        for line in sys.stdin:
            ((verb, argument),) = json.loads(line).items()
            print(json.dumps({verb: getattr(nodes, verb)(argument)}), flush=True)
    finally:
        nodes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
