"""A Ray cluster of several nodes on this machine: `python -m tests.flows.ray_nodes FOLDER PORT CPUS`.

It reads one JSON object a line from stdin and answers with one: `{"add": {"num_cpus": 2}}`, `{"kill": node}`,
`{"demand": true}`: what an autoscaler would see. At the end of stdin it ends its own nodes, and no other Ray on this
machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import NodeStatus


class Nodes:
    def __init__(self, folder: Path, port: int, cpus: int) -> None:
        head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
        self._common = {"temp_dir": str(folder), "object_store_memory": 80 << 20, "dashboard_agent_listen_port": None}
        self._cluster = Cluster(True, head_node_args={"num_cpus": cpus, **head, **self._common})
        (folder / "ray_current_cluster").write_text(self._cluster.gcs_address)  # where the head's jobs look for it
        self._nodes: dict[str, Any] = {}

    def add(self, arguments: dict[str, Any]) -> str:
        node = self._cluster.add_node(**arguments, **self._common)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def kill(self, node: str) -> str:
        self._cluster.remove_node(self._nodes.pop(node), allow_graceful=False)
        return node

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
