"""`make serve` for real: a Prefect server, a process worker, an MLflow server, and a deployment run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.flows.conftest import Workplace


def test_a_deployment_does_the_same_work(finished: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.serve import running

    for name, value in finished.environment.items():
        monkeypatch.setenv(name, value)
    before = finished.manifests()
    with running(free_port(), free_port()) as environment:
        prefect = str(Path(sys.executable).parent / "prefect")
        parameters = {"root": finished.root, "overrides": ["sample.guidance.scale=1.5"]}
        command = [prefect, "deployment", "run", "sfd-full/demo-tiny", "--watch", "--params", json.dumps(parameters)]
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert finished.rebuilt_since(before) == {"sample", "evaluate", "report"}, "another guidance scale, no more"
        states = _task_states(environment["PREFECT_API_URL"])
        assert states["sample"] == "Completed"
        assert {"shard", "train_vavae", "train_semvae", "encode", "train_dit"} <= states.keys()
        assert _tracked_scales(environment["MLFLOW_TRACKING_URI"]) >= {1.5, 2.0}, "both runs compare in the MLflow UI"
        deployments = _post(environment["PREFECT_API_URL"], "deployments/filter")
        assert {"demo", "shard", "train-dit", "sample"} <= {each["name"] for each in deployments}


def _tracked_scales(uri: str) -> set[float]:
    """Guidance scales of the flow runs that have scores, asked of the real MLflow server."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("latentforge")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.flow = 'sfd-full'", max_results=1000)
    scored = [run for run in runs if "evaluate/frechet_efficientnet_lite0" in run.data.metrics]
    return {json.loads(run.data.params["sample.guidance.scale"]) for run in scored}


def _task_states(api: str) -> dict[str, str]:
    return {run["name"].split()[0]: run["state"]["name"] for run in _post(api, "task_runs/filter")}


def _post(api: str, path: str) -> list[dict]:
    request = urllib.request.Request(f"{api}/{path}", data=b"{}", headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())
