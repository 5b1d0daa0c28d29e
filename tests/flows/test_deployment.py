"""`make serve` for real: a Prefect server, a process worker, an MLflow server, and a deployment run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

from configs import load_recipe
from tests.flows.conftest import Workplace


def test_a_deployment_does_the_same_work(finished: Workplace) -> None:
    before = finished.manifests()
    prefect = str(Path(sys.executable).parent / "prefect")
    parameters = {"root": finished.root, "overrides": ["sample.guidance.scale=1.5"]}
    command = [prefect, "deployment", "run", "sfd-full/demo-tiny", "--watch", "--params", json.dumps(parameters)]
    done = subprocess.run(
        command, env={**os.environ, **finished.environment}, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert finished.rebuilt_since(before) == {"sample", "evaluate", "report"}, "another guidance scale, no more"
    (flow_run,) = [
        run
        for run in _post(finished, "flow_runs/filter")
        if run["parameters"].get("root") == finished.root and run["deployment_id"]
    ]
    states = {
        run["name"].split()[0]: run["state"]["name"]
        for run in _post(finished, "task_runs/filter")
        if run["flow_run_id"] == flow_run["id"]
    }
    assert {states.pop(stage) for stage in ("sample", "evaluate", "report")} == {"Completed"}
    assert states == dict.fromkeys(("shard", "train_vavae", "train_semvae", "encode", "train_dit"), "Cached")
    assert _tracked_scales(finished) >= {1.5, load_recipe("demo_tiny").sample.guidance.scale}, (
        "both runs compare in the MLflow UI"
    )
    assert {"demo", "shard", "train-dit", "sample"} <= {each["name"] for each in _post(finished, "deployments/filter")}
    assert flow_run["name"] == "demo_tiny guidance.scale=1.5"
    _has_scores_and_bars(finished, flow_run["id"])


def _has_scores_and_bars(workplace: Workplace, flow_run: str) -> None:
    """What Prefect's page of the run shows: scores beside those of real images, and a full bar for each stage made."""
    latest = {"sort": "CREATED_DESC", "limit": 50}
    shown = [each for each in _post(workplace, "artifacts/filter", latest) if each["flow_run_id"] == flow_run]
    (scores,) = [each for each in shown if each["key"] == "scores"]
    assert scores["type"] == "markdown" and scores["data"].startswith("**demo_tiny guidance.scale=1.5**")
    assert re.search(r"\| frechet_efficientnet_lite0 \| [\d.]+ \| [\d.]+ \|", scores["data"])
    assert "report.html" in scores["data"] and "MLflow: [run](http" in scores["data"]
    bars = {each["description"] for each in shown if each["type"] == "progress"}
    assert bars == {f"{stage}: 100 %" for stage in ("sample", "evaluate", "report")}


def _tracked_scales(workplace: Workplace) -> set[float]:
    """Guidance scales of the flow runs that have scores, asked of the real MLflow server."""
    from mlflow import MlflowClient

    client = MlflowClient(workplace.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("latentforge")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.flow = 'sfd-full'", max_results=1000)
    scored = [run for run in runs if "evaluate/frechet_efficientnet_lite0" in run.data.metrics]
    return {json.loads(run.data.params["sample.guidance.scale"]) for run in scored}


def _post(workplace: Workplace, path: str, body: dict | None = None) -> list[dict]:
    url = f"{workplace.environment['PREFECT_API_URL']}/{path}"
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())
