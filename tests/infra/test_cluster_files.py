"""The files that start clusters: each valid by its own rules, and all of them agreeing with each other."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from configs.cluster import Cluster, Pool, cluster_names, load_cluster
from tests.helpers.cluster_files import (
    CLOUDS,
    INFRA,
    KUBERNETES,
    POOLS,
    REPOSITORY,
    files,
    flow_job,
    kuberay_accepts,
    manifests,
    pods,
    ray_up,
)

# ----------------------------------------------------------------------------------------------------- each alone


def test_a_flow_run_is_a_valid_job_that_reaches_the_cluster() -> None:
    job = flow_job()
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    container = job["spec"]["template"]["spec"]["containers"][0]
    found = {variable["name"]: variable["value"] for variable in container["env"]}
    cluster = manifests()["RayCluster latentforge"]
    ports = {
        port["containerPort"] for port in cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert found["RAY_API_SERVER_ADDRESS"] == f"http://{cluster['metadata']['name']}-head-svc:8265" and 8265 in ports
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{mounts['ray-token']}/auth_token"
    secret = next(v["secret"] for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "ray-token")
    assert secret["secretName"] == cluster["metadata"]["name"], "KubeRay names the token's secret after the cluster"
    (worker,) = pods()["Deployment prefect-worker"]["spec"]["containers"]
    (pool,) = {
        each["work_pool"]["name"]
        for each in yaml.safe_load((INFRA / "prefect" / "kubernetes.yaml").read_text())["deployments"]
    }
    assert worker["command"][worker["command"].index("--pool") + 1] == pool


@pytest.mark.parametrize("name", manifests())
def test_kubernetes_accepts(name: str) -> None:
    manifest = manifests()[name]
    if manifest["apiVersion"] == "ray.io/v1":
        kuberay_accepts(manifest)
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
    kuberay_accepts({"kind": "RayCluster", "spec": spec})
    for slip, word in (
        ({"autoscalerOptions": {"idleTimeoutSecond": 60}}, "idleTimeoutSecond"),
        ({"workerGroupSpecs": [{"groupName": "decode"}]}, "is a required property"),
    ):
        with pytest.raises(jsonschema.ValidationError, match=word):
            kuberay_accepts({"kind": "RayCluster", "spec": {**spec, **slip}})


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
    used = set(re.findall(r"[\w.]+/latentforge:[\w.]+", "\n".join(path.read_text() for path in files())))
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
    for name in ("servers.txt", "clouds.txt"):
        assert f"-r {name}" in dockerfile and f"infra/container/{name}" in dockerfile
        extra = (INFRA / "container" / name).read_text().splitlines()
        pins = dict(line.split("==") for line in extra if line and not line.startswith("#"))
        assert pins and all(lock.get(package, pin) == pin for package, pin in pins.items())
    cluster = manifests()["RayCluster latentforge"]["spec"]
    assert cluster["rayVersion"] == lock["ray"] == version("ray")
    python = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    base = re.search(r"ARG PYTHON=python:(\d+\.\d+)", dockerfile)
    assert base and f">={base[1]}," in python


def test_the_image_has_the_whole_code() -> None:
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {pattern.removesuffix("*") for pattern in setuptools["packages"]["find"]["include"]}
    assert {"configs", "models", "tasks", "flows", "infra"} <= folders
    ignored = (INFRA / "container" / "Dockerfile.dockerignore").read_text().split()
    dockerfile = (INFRA / "container" / "Dockerfile").read_text()
    for folder in folders:
        assert f"COPY {folder} {folder}\n" in dockerfile and f"!{folder}" in ignored
    for module in setuptools["py-modules"]:
        assert re.search(rf"^COPY .*{module}\.py \./$", dockerfile, re.MULTILINE) and f"!{module}.py" in ignored


@pytest.mark.parametrize("name", [name for name in cluster_names() if load_cluster(name).provider != "local"])
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
        checks = [(each["command"], each["resources"]["limits"]) for each in spec.get("initContainers", [])]
        assert [(command[-1], given["nvidia.com/gpu"]) for command, given in checks] == (
            [(str(pool.gpus), pool.gpus)] if pool.gpus else []
        ), "a pod looks for all its GPUs before Ray starts in it"
        assert all(command[:-1] == ["python", "-m", "infra.gpus"] for command, _ in checks)
        _fits(group["template"], pool)


def test_all_clusters_let_go_of_idle_nodes_alike() -> None:
    options = manifests()["RayCluster latentforge"]["spec"]["autoscalerOptions"]
    assert {60 * ray_up(cloud)["idle_timeout_minutes"] for cloud in CLOUDS} == {options["idleTimeoutSeconds"]}
    planned = {load_cluster(name).assumed.idle_seconds for name in ("aws", "gcp", "kubernetes")}
    assert planned == {options["idleTimeoutSeconds"]}


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
        commands = (*config["head_start_ray_commands"], *config["worker_start_ray_commands"])
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 2 and all("--object-spilling-directory=/local/" in command for command in starts)
    for name, pod in pods().items():
        if "RayCluster" in name:
            mounts = {mount["name"]: mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
            assert mounts["local"] == "/local" and mounts["memory"] == "/dev/shm"
    home = manifests()["ConfigMap latentforge"]["data"]["LATENTFORGE_HOME"]
    assert home.startswith("/local/") and f"LATENTFORGE_HOME={home}" in (INFRA / "container" / "Dockerfile").read_text()


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
