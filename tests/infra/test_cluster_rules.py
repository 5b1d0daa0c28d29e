"""What the cluster files let in and hand out, what is watched, and that the page about them is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.cluster_files import CLOUDS, INFRA, REPOSITORY, documents, files, manifests, pods, ray_up, walk

# ------------------------------------------------------------------------------------------- closed and unprivileged


def test_nothing_is_open_to_the_outside() -> None:
    closed = manifests()["NetworkPolicy closed"]["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, each in manifests().items():
        assert each["kind"] != "Ingress"
        assert each.get("spec", {}).get("type", "ClusterIP") == "ClusterIP" or each["kind"] != "Service", name
        if each["kind"] == "NetworkPolicy":
            for rule in each["spec"].get("ingress", []):
                assert rule["from"] and not [peer for peer in rule["from"] if "ipBlock" in peer], name
    for cloud in CLOUDS:
        config = ray_up(cloud)
        assert config["provider"]["use_internal_ips"] is True
        (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
        assert "--dashboard-host=127.0.0.1" in start
        for node in config["available_node_types"].values():
            if cloud == "aws":
                assert node["node_config"]["SecurityGroupIds"], "else Ray makes a group that lets SSH in from anywhere"
                assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
            else:
                (interface,) = node["node_config"]["networkInterfaces"]
                assert "accessConfigs" not in interface, "an access config is a public address"


def test_every_pod_that_talks_is_in_a_policy() -> None:
    """Labels in network policies are labels of pods, so that no rule is about nothing."""
    labels = {pod["metadata"]["labels"]["app"] for pod in pods().values()}
    named = {
        value
        for each in manifests().values()
        if each["kind"] == "NetworkPolicy"
        for path, value in walk(each["spec"])
        if path.endswith("/app") or "/values/" in path
    }
    assert named == labels


@pytest.mark.parametrize("name", pods())
def test_pods_run_without_privileges(name: str) -> None:
    spec = pods()[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    asks_kubernetes = {"RayCluster latentforge head", "Deployment prefect-worker"}
    assert spec["automountServiceAccountToken"] is (name in asks_kubernetes)
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"]["memory"]


def test_secrets_are_only_referred_to() -> None:
    for name, each in manifests().items():
        assert each["kind"] != "Secret", name
    for pod in pods().values():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                if re.search(r"PASSWORD|TOKEN(?!_PATH)|SECRET|KEY|CONNECTION|STORE_URI", variable["name"]):
                    assert set(variable) == {"name", "valueFrom"} and "secretKeyRef" in variable["valueFrom"]
    leaked = re.compile(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s:]+:[^@\s]+@|(password|secret_access_key)\s*[:=]\s*\S", re.I
    )
    for path in files():
        assert not leaked.search(path.read_text()), path.name


def test_the_bucket_policy_allows_what_storage_does_and_no_more(s3_root: str, caplog: pytest.LogCaptureFixture) -> None:
    """Requests of every verb of our storage on a real S3 server are the policy's actions, all under the prefix."""
    import logging

    import pyarrow as pa

    from infra.storage import Storage

    caplog.set_level(logging.DEBUG, logger="s3fs")
    storage = Storage.at(s3_root).child("stage", "0123")
    storage.check_writable()
    storage.write_bytes("small", b"x")
    storage.write_bytes("large", b"x" * (60 << 20))  # in several parts
    storage.write_table("table.parquet", pa.table({"x": [1, 2]}), rows_per_group=1)
    assert storage.exists("small") and storage.size("small") == 1 and storage.read_range("large", 5, 2) == b"xx"
    assert storage.names() and storage.sizes() and not storage.exists("missing")
    with storage.open("table.parquet") as file:
        file.read()
    storage.delete("small")
    storage.delete()
    calls = {match[1] for record in caplog.records if (match := re.match(r"CALL: (\w+)", record.getMessage()))}
    actions = {ACTIONS[call] for call in calls}
    policy = json.loads((INFRA / "policies" / "bucket-access-aws.json").read_text())
    own = [each for each in policy["Statement"] if "REPLACE-BUCKET" in str(each["Resource"])]
    allowed = {
        action for each in own for action in ([each["Action"]] if isinstance(each["Action"], str) else each["Action"])
    }
    assert actions <= allowed
    assert allowed - actions <= {"s3:AbortMultipartUpload"}, "asked for only when an upload fails"


ACTIONS = {
    "list_objects_v2": "s3:ListBucket",
    "head_bucket": "s3:ListBucket",
    "head_object": "s3:GetObject",
    "get_object": "s3:GetObject",
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
}


# --------------------------------------------------------------------------------------------- watching and the page


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    """Ray's, which its own dashboards show, and every one of ours (tests/infra/test_metrics.py)."""
    import ray.dashboard.modules.metrics.dashboards as dashboards

    from infra.metrics import COUNTERS, GAUGES

    ours = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    known = "\n".join(path.read_text() for path in Path(dashboards.__path__[0]).glob("*.py"))
    board = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert shown
    assert {metric for each in shown for metric in re.findall(r"\bray_latentforge_\w+", each)} == ours
    for expression in shown:
        for metric in re.findall(r"\b(?:ray|autoscaler)_[a-z_]+(?=[{\[)\s])", expression):
            if metric not in {"ray_train_run_name"} | ours:
                assert re.search(rf"\b{metric}\b[{{\[(]", known), metric
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_looks_where_ray_is() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (config,) = documents(INFRA / "monitoring" / "prometheus.yaml")
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["ray"]["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    keeps = [rule for rule in jobs["ray-pods"]["relabel_configs"] if rule.get("action") == "keep"]
    label, port = (rule["regex"] for rule in keeps)
    for name, pod in pods().items():
        if "RayCluster" in name:
            assert re.fullmatch(label, pod["metadata"]["labels"]["app"])
            ports = [each for each in pod["spec"]["containers"][0]["ports"] if re.fullmatch(port, each["name"])]
            assert 8080 in {each["containerPort"] for each in ports}
    assert jobs["ray-pods"]["kubernetes_sd_configs"][0]["namespaces"]["names"] == ["latentforge"]


def test_the_page_names_everything_to_fill_in() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    text = "\n".join(path.read_text() for path in files())
    wanted = set(re.findall(r"\b(?:ami|subnet|sg)-REPLACE\b|\bREPLACE-[A-Z]+\b", text))
    assert wanted == set(re.findall(r"`((?:ami|subnet|sg)-REPLACE|REPLACE-[A-Z]+)`", page))


def test_the_page_points_at_files_that_are_there() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`((?:infra|configs|tasks|flows|docs|models)/[\w./-]+\.\w+)`", page))
    assert named
    for name in named:
        assert (REPOSITORY / name).is_file(), name
