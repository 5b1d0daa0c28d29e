"""A Ray cluster of several nodes on this machine: `python -m tests.helpers.ray_nodes FOLDER PORT CPUS`.

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
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION, NodeStatus


class Nodes:
    def __init__(self, folder: Path, port: int, cpus: int) -> None:
        head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        self._common = {"temp_dir": str(folder), "object_store_memory": 80 << 20, "dashboard_agent_listen_port": None}
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


def main(folder: Path, port: int, cpus: int) -> None:
    nodes = Nodes(folder, port, cpus)
    print(json.dumps({"ready": True}), flush=True)
    try:
        for line in sys.stdin:
            ((verb, argument),) = json.loads(line).items()
            print(json.dumps({verb: getattr(nodes, verb)(argument)}), flush=True)
    finally:
        nodes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
