"""The deployments that are written down: each one runs a flow there is, with parameters that it takes."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import load_recipe, recipe_names
from configs.race import load_race
from configs.reproduction import of_tokenizer
from flows.stages import STAGES

REPOSITORY = Path(__file__).parents[2]
FILES = ("prefect.yaml", "infra/prefect/kubernetes.yaml")
DEPLOYMENTS = [
    pytest.param(each, id=f"{file}-{each['name']}")
    for file in FILES
    for each in yaml.safe_load((REPOSITORY / file).read_text())["deployments"]
]


def deployments(file: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((REPOSITORY / file).read_text())["deployments"]
    return found


def named(deployment: dict[str, Any]) -> tuple[str, str]:
    """What Prefect knows it by: its flow and its name."""
    return deployment["entrypoint"], deployment["name"]


def flow_of(deployment: dict[str, Any]) -> Any:
    path, name = deployment["entrypoint"].split(":")
    return getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_deployment_runs_a_flow_with_what_it_takes(deployment: dict[str, Any]) -> None:
    flow = flow_of(deployment)
    for given in (deployment["parameters"], *(each["parameters"] for each in deployment.get("schedules", []))):
        flow.validate_parameters({**deployment["parameters"], **given})
        if "race" in given:
            load_race(given["race"])
        else:
            load_recipe(given.get("recipe", "demo"))
    assert deployment["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
    for schedule in deployment.get("schedules", []):
        assert schedule["active"] is False, "an example starts nothing by itself"
    parameters = flow.parameters.model_dump()["properties"]
    assert all("type" in each or "anyOf" in each or "enum" in each for each in parameters.values()), "typed in the UI"


def test_every_recipe_and_every_stage_is_deployed() -> None:
    found = deployments("prefect.yaml")
    assert {each["parameters"].get("recipe") for each in found} >= set(recipe_names())
    assert {each["parameters"].get("stage") for each in found} >= {stage.name for stage in STAGES}
    names = [named(each) for each in found]
    assert len(set(names)) == len(names)
    assert {recipe for each in found for recipe in [each["parameters"].get("recipe")] if recipe == each["name"]} == {
        *recipe_names()
    }, "each by its own name"


def test_a_wrong_stage_is_refused_by_the_form() -> None:
    from prefect.exceptions import ParameterTypeError

    from flows.stages import single_stage

    with pytest.raises(ParameterTypeError, match="encode"):
        single_stage.validate_parameters({"stage": "enocde"})


def test_kubernetes_takes_over_what_is_for_clusters() -> None:
    here = {named(each): each for each in deployments("prefect.yaml") if "cluster" in each.get("tags", ())}
    there = {named(each): each for each in deployments("infra/prefect/kubernetes.yaml")}
    assert set(here) == set(there)
    for name, each in there.items():
        *_, (last, overrides) = each["parameters"].items()
        assert last == "overrides" and {**here[name]["parameters"], "overrides": overrides} == each["parameters"]


READING_IMAGES = [
    each
    for each in deployments("infra/prefect/kubernetes.yaml")
    if not each["entrypoint"].endswith(":reproduce") or of_tokenizer(each["parameters"]["recipe"])
]


@pytest.mark.parametrize("deployment", READING_IMAGES, ids=lambda each: each["name"])
def test_pods_look_for_images_where_pods_can_see_them(deployment: dict[str, Any]) -> None:
    given = deployment["parameters"]
    own, there = load_recipe(given["recipe"]).data.source, load_recipe(given["recipe"], given["overrides"]).data.source
    assert there.kind == own.kind and there.path.startswith("s3://REPLACE-IMAGES/")
    assert (there.test_path is None) == (own.test_path is None) and (there.test_path or "s3://").startswith("s3://")


def test_a_ray_job_looks_for_images_where_pods_can_see_them() -> None:
    (job,) = yaml.safe_load_all((REPOSITORY / "infra/kubernetes/rayjob.yaml").read_text())
    command = shlex.split(shlex.split(job["spec"]["entrypoint"])[-1])
    overrides = [command[number + 1] for number, word in enumerate(command) if word == "--set"]
    source = load_recipe(command[command.index("--recipe") + 1], overrides).data.source
    assert source.path.startswith("s3://REPLACE-IMAGES/") and source.test_path.startswith("s3://REPLACE-IMAGES/")
