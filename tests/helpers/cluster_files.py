"""The files that start clusters, as tests read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

REPOSITORY = Path(__file__).parents[2]
INFRA = REPOSITORY / "infra"
KUBERNETES = "1.34"
KUBERAY_SCHEMA = Path(__file__).with_name("kuberay_schema.json")
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


def kuberay_accepts(manifest: dict[str, Any]) -> None:
    """A RayCluster or RayJob by KubeRay's own schema, in which a field that it does not know is a slip.

    Pods inside are Kubernetes' to judge, and left out of the file, whose head says where it comes from.

    Raises:
        jsonschema.ValidationError: naming the field.
    """
    schema = json.loads(KUBERAY_SCHEMA.read_text())["kinds"][manifest["kind"]]
    jsonschema.Draft7Validator(_closed(schema)).validate(manifest)


def _closed(schema: Any) -> Any:
    """The schema, in which an object has the fields that are named and no others."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
    if schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema:
        closed["additionalProperties"] = False
    return closed
