"""The files that start clusters, as tests read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

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


def pods() -> dict[str, dict[str, Any]]:
    """Every pod template: of Kubernetes' kinds, of Ray's, and of flow runs."""
    found: dict[str, dict[str, Any]] = {"flow run": flow_job()["spec"]["template"]}
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


def flow_job() -> dict[str, Any]:
    """The Kubernetes job of a flow run, as Prefect's worker makes it of the work pool's template and its defaults."""
    pool = json.loads((INFRA / "prefect" / "work-pool.json").read_text())
    given = {name: each["default"] for name, each in pool["variables"]["properties"].items() if "default" in each}
    given |= {"command": ["prefect", "flow-run", "execute"]}
    given["env"] = [{"name": name, "value": value} for name, value in given["env"].items()]

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        if isinstance(value, list):
            return [filled(each) for each in value]
        if isinstance(value, str):
            whole = re.fullmatch(r"\{\{ (\w+) \}\}", value)
            return given[whole[1]] if whole else re.sub(r"\{\{ (\w+) \}\}", lambda name: given[name[1]], value)
        return value

    return dict(filled(pool["job_configuration"]["job_manifest"]))


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
