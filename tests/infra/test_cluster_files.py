"""The files that start clusters: each valid by its own rules, and all of them agreeing with each other."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from configs.cluster import Cluster, Pool, cluster_names, load_cluster

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
KUBERNETES = "1.34"
CLOUDS = ("aws", "gcp")
POOLS = {"head", "decode", "infer", "train"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def manifests() -> dict[str, dict[str, Any]]:
    found = [each for path in sorted((INFRA / "kubernetes").glob("*.yaml")) for each in documents(path)]
    return {f"{each['kind']} {each['metadata']['name']}": each for each in found}


def ray_up(cloud: str) -> dict[str, Any]:
    (config,) = documents(INFRA / "ray" / f"{cloud}.yaml")
    return config


def files() -> list[Path]:
    """Every configuration file under infra/, code left out."""
    return sorted(path for path in INFRA.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"})


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from walk(each, f"{path}/{key}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from walk(each, f"{path}/{number}")
    else:
        yield path, value


# ------------------------------------------------------------------------------------------------ Ray's own kinds


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Template(Strict):
    metadata: dict[str, Any] = {}
    spec: dict[str, Any]


class Autoscaler(Strict):
    idleTimeoutSeconds: int = Field(gt=0)
    upscalingMode: Literal["Default", "Conservative"]
    resources: dict[str, Any]


class Head(Strict):
    serviceType: Literal["ClusterIP"]
    rayStartParams: dict[str, str]
    template: Template


class Group(Strict):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(gt=0)
    rayStartParams: dict[str, str]
    template: Template


class Authentication(Strict):
    mode: Literal["token"]


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: Authentication
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: Autoscaler
    headGroupSpec: Head
    workerGroupSpecs: list[Group]


class RayJobSpec(Strict):
    clusterSelector: dict[str, str]
    submissionMode: Literal["K8sJobMode"]
    entrypoint: str
    entrypointNumCpus: int
    submitterPodTemplate: Template


RAY_KINDS: dict[str, type[Strict]] = {"RayCluster": RayClusterSpec, "RayJob": RayJobSpec}
"""What we use of KubeRay's kinds (ray.io/v1), stricter than they are: a field that is not here is a slip."""


def pods() -> dict[str, dict[str, Any]]:
    """Every pod template: of Kubernetes' kinds and of Ray's."""
    found: dict[str, dict[str, Any]] = {}
    for name, each in manifests().items():
        spec = each.get("spec", {})
        if "template" in spec:
            found[name] = spec["template"]
        if each["kind"] == "RayCluster":
            found[f"{name} head"] = spec["headGroupSpec"]["template"]
            found |= {f"{name} {group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
        if each["kind"] == "RayJob":
            found[name] = spec["submitterPodTemplate"]
    return found


# ----------------------------------------------------------------------------------------------------- each alone


@pytest.mark.parametrize("name", manifests())
def test_kubernetes_accepts(name: str) -> None:
    manifest = manifests()[name]
    if manifest["apiVersion"] == "ray.io/v1":
        RAY_KINDS[manifest["kind"]].model_validate(manifest["spec"])
        assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", pods())
def test_kubernetes_accepts_pods_inside_other_kinds(name: str) -> None:
    template = pods()[name]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
    kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)


def test_validation_does_refuse() -> None:
    """A slip in a core kind, in a pod of Ray's kind and in Ray's kind itself."""
    broken = manifests()["Deployment mlflow"]
    broken["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)
    spec = manifests()["RayCluster latentforge"]["spec"]
    with pytest.raises(ValueError, match="idleTimeoutSecond\n"):
        RayClusterSpec.model_validate({**spec, "autoscalerOptions": {"idleTimeoutSecond": 60}})


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(ray_up(cloud))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == POOLS
    workers = sum(each["max_workers"] for name, each in prepared["available_node_types"].items() if name != "head")
    assert prepared["max_workers"] == workers
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config({**prepared, "idle_timeout_minute": 5})


@pytest.mark.parametrize("path", sorted((INFRA / "policies").glob("*.json")), ids=lambda path: path.stem)
def test_policies_are_policies(path: Path) -> None:
    policy = json.loads(path.read_text())
    assert policy["Version"] == "2012-10-17"
    for statement in policy["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        if statement["Effect"] == "Allow":
            assert not [action for action in actions if "*" in action], "rights are named one by one"
            assert statement["Resource"] != "*" or actions[0].startswith("ec2:"), "buckets and roles are named"
            assert "Principal" not in statement


# ------------------------------------------------------------------------------------------------- all together


def test_one_image_of_one_version_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    used = set(re.findall(r"\S+/latentforge:[\w.]+", "\n".join(path.read_text() for path in files())))
    assert used == {f"registry.example.com/latentforge:{project['version']}"}
    images = {each["image"] for pod in pods().values() for each in pod["spec"]["containers"]}
    assert {image for image in images if image not in used} == {"postgres:17-bookworm"}
    assert all(ray_up(cloud)["docker"]["image"] in used for cloud in CLOUDS)


def test_the_image_has_the_laptops_pins() -> None:
    dockerfile = (INFRA / "container" / "Dockerfile").read_text()
    pip = [line for line in dockerfile.splitlines() if "pip install" in line]
    assert [line for line in pip if "-r requirements.lock" in line]
    assert all("--no-deps" in line for line in pip), "nothing but the pins may come in"
    lock = dict(line.split("==") for line in (REPOSITORY / "requirements.lock").read_text().split())
    extra = (INFRA / "container" / "servers.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in extra if line and not line.startswith("#"))
    assert all(lock.get(name, pin) == pin for name, pin in pins.items())
    cluster = manifests()["RayCluster latentforge"]["spec"]
    assert cluster["rayVersion"] == lock["ray"] == version("ray")
    python = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    base = re.search(r"ARG PYTHON=python:(\d+\.\d+)", dockerfile)
    assert base and f">={base[1]}," in python


def test_the_image_has_the_whole_code() -> None:
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    ignored = (INFRA / "container" / "Dockerfile.dockerignore").read_text().split()
    dockerfile = (INFRA / "container" / "Dockerfile").read_text()
    for folder in {package.split(".")[0] for package in packages}:
        assert f"COPY {folder} {folder}\n" in dockerfile and f"!{folder}" in ignored


@pytest.mark.parametrize("name", [name for name in cluster_names() if name != "local"])
def test_described_clusters_have_all_pools(name: str) -> None:
    cluster = load_cluster(name)
    assert set(cluster.pools) == POOLS
    assert not cluster.pools["decode"].gpus and cluster.pools["decode"].spot
    assert cluster.pools["infer"].spot and not cluster.pools["train"].spot, "a lost node stops the whole gang"
    assert cluster.pools["infer"].gpus < cluster.pools["train"].gpus
    for pool in ("decode", "infer", "train"):
        assert cluster.pools[pool].min_nodes == 0 and cluster.pools[pool].local_disk_gb


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_up_starts_what_is_described(cloud: str) -> None:
    config, cluster = ray_up(cloud), load_cluster(cloud)
    assert config["provider"]["region"] == cluster.region
    assert config["head_node_type"] == "head"
    for name, pool in cluster.pools.items():
        node = config["available_node_types"][name]
        assert node["resources"] == {"CPU": pool.cpus} | ({"GPU": pool.gpus} if pool.gpus else {})
        machine = node["node_config"]["InstanceType" if cloud == "aws" else "machineType"]
        assert machine == pool.machine
        assert _is_spot(cloud, node["node_config"]) == pool.spot
        if name != "head":
            assert (node["min_workers"], node["max_workers"]) == (pool.min_nodes, pool.max_nodes)


def test_kubernetes_starts_what_is_described() -> None:
    cluster, spec = load_cluster("kubernetes"), manifests()["RayCluster latentforge"]["spec"]
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == str(cluster.pools["head"].cpus)
    _fits(head["template"], cluster.pools["head"])
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == set(cluster.pools) - {"head"}
    for name, group in groups.items():
        pool, spec = cluster.pools[name], group["template"]["spec"]
        assert group["rayStartParams"]["num-cpus"] == str(pool.cpus)
        assert group["rayStartParams"].get("num-gpus", "0") == str(pool.gpus)
        assert (group["minReplicas"], group["maxReplicas"]) == (pool.min_nodes, pool.max_nodes)
        assert spec["nodeSelector"]["latentforge/pool"] == name == spec["tolerations"][0]["value"]
        assert ("latentforge/market" in spec["nodeSelector"]) == pool.spot
        limits = spec["containers"][0]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu", 0) == pool.gpus
        _fits(group["template"], pool)


def test_all_clusters_let_go_of_idle_nodes_alike() -> None:
    options = manifests()["RayCluster latentforge"]["spec"]["autoscalerOptions"]
    assert {60 * ray_up(cloud)["idle_timeout_minutes"] for cloud in CLOUDS} == {options["idleTimeoutSeconds"]}


def test_recipes_for_gpus_fit_the_pools() -> None:
    """One worker and one actor of every recipe with GPUs find a node, and decoding none of those."""
    from configs import load_recipe, recipe_names

    for name in recipe_names():
        compute = load_recipe(name).compute
        for cluster in map(load_cluster, ("aws", "gcp", "kubernetes")):
            if compute.train.gpus_per_worker:
                pool = cluster.pools["train"]
                assert pool.cpus == pool.gpus * compute.train.cpus_per_worker, (
                    name,
                    "CPUs beside GPUs are for workers",
                )
            if compute.actors.gpus_per_actor:
                assert compute.actors.cpus_per_actor <= cluster.pools["infer"].cpus, name


def test_caches_and_spilled_objects_go_to_local_disks() -> None:
    for cloud in CLOUDS:
        config = ray_up(cloud)
        assert "--volume /local:/local" in config["docker"]["run_options"]
        for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
            assert "--object-spilling-directory=/local/" in command
    for name, pod in pods().items():
        if "RayCluster" in name:
            mounts = {mount["name"]: mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
            assert mounts["local"] == "/local" and mounts["memory"] == "/dev/shm"
    home = manifests()["ConfigMap latentforge"]["data"]["LATENTFORGE_HOME"]
    assert home.startswith("/local/") and f"LATENTFORGE_HOME={home}" in (INFRA / "container" / "Dockerfile").read_text()


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
        assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
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
    assert spec["automountServiceAccountToken"] is (name == "RayCluster latentforge head")
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"]["memory"]


def test_secrets_are_only_referred_to() -> None:
    for name, each in manifests().items():
        assert each["kind"] != "Secret", name
    for pod in pods().values():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                if re.search(r"PASSWORD|TOKEN|SECRET|KEY|CONNECTION|STORE_URI", variable["name"]):
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


def test_the_dashboard_shows_metrics_that_ray_has() -> None:
    import ray.dashboard.modules.metrics.dashboards as dashboards

    known = "\n".join(path.read_text() for path in Path(dashboards.__path__[0]).glob("*.py"))
    board = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert shown
    for expression in shown:
        for metric in re.findall(r"\b(?:ray|autoscaler)_[a-z_]+(?=[{\[)\s])", expression):
            if metric not in {"ray_train_run_name"}:
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
    secrets = {
        (value["name"], value["key"])
        for pod in pods().values()
        for container in pod["spec"]["containers"]
        for variable in container.get("env", [])
        if (value := variable.get("valueFrom", {}).get("secretKeyRef"))
    }
    for name, key in secrets:
        assert name in page and f"`{key}`" in page


def test_the_page_points_at_files_that_are_there() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    named = set(re.findall(r"`((?:infra|configs|tasks|flows|docs|models)/[\w./-]+\.\w+)`", page))
    assert named
    for name in named:
        assert (REPOSITORY / name).is_file(), name


# ------------------------------------------------------------------------------------------------------- helpers


def _is_spot(cloud: str, node: dict[str, Any]) -> bool:
    if cloud == "aws":
        return bool(node.get("InstanceMarketOptions", {}).get("MarketType") == "spot")
    return bool(node.get("scheduling", {}).get("provisioningModel") == "SPOT")


def _fits(template: dict[str, Any], pool: Pool) -> None:
    """A pod asks for less than its machine has, and may use all the CPUs that Ray gives away."""
    (container,) = template["spec"]["containers"]
    requests = container["resources"]["requests"]
    assert _gib(requests["memory"]) < pool.memory_gib
    assert requests["memory"] == container["resources"]["limits"]["memory"]
    if "ephemeral-storage" in requests:
        assert _gib(requests["ephemeral-storage"]) * 1.0737 < pool.local_disk_gb


def _gib(quantity: str) -> float:
    number, unit = float(quantity[:-2]), quantity[-2:]
    return number * {"Mi": 2**-10, "Gi": 1, "Ti": 2**10}[unit]


def test_a_cluster_file_of_ones_own(tmp_path: Path) -> None:
    from configs import UserError

    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: aws\npools: {train: {max_nodes: 2}}\n")
    cluster: Cluster = load_cluster(str(mine))
    assert cluster.pools["train"].max_nodes == 2 and cluster.pools["train"].machine == "p5.48xlarge"
    mine.write_text("extends: aws\npools: {trian: {machine: x, cpus: 1, memory_gib: 1, network_gbit: 1.0}}\n")
    with pytest.raises(UserError, match="trian"):
        load_cluster(str(mine))
    with pytest.raises(UserError, match="did you mean aws"):
        load_cluster("awz")
