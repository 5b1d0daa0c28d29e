"""The main job end to end on real images, and the laws of its cache."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from configs import load_recipe
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks.dag import stages_of
from tests.flows.conftest import PLANTED, Workplace

ALL = {stage.name for stage in stages_of("sfd-full") if stage.present(load_recipe("demo_tiny"))}


def _artifact(workplace: Workplace, stage: str) -> Artifact:
    return Artifact(f"file://{workplace.root}", stage, workplace.first[stage])


def test_the_whole_dag_runs(finished: Workplace) -> None:
    assert set(finished.manifests()) >= ALL
    images = _artifact(finished, "sample")
    assert images.manifest.rows == 40
    table = pq.read_table(Path(images.uri.removeprefix("file://")) / images.files(suffix=".parquet")[0].path)
    assert {"index", "label", "image"} <= set(table.column_names)
    report = _artifact(finished, "report").read("report.html").decode()
    assert "<html" in report and "http://" not in report.replace("http://www.w3.org", "")
    scores = _artifact(finished, "evaluate").manifest.scores
    assert {"frechet_efficientnet_lite0", "floor_frechet_efficientnet_lite0"} <= set(scores)
    assert not [name for name in scores if name.startswith("fid")]


def test_every_file_is_as_its_manifest_says(finished: Workplace) -> None:
    for stage, prints in finished.manifests().items():
        for fingerprint in prints:
            artifact = Artifact(f"file://{finished.root}", stage, fingerprint)
            for entry in artifact.manifest.files:
                artifact.read(entry.path)


def test_credentials_of_the_environment_are_in_nothing_that_a_run_leaves(finished: Workplace) -> None:
    """Neither in artifacts, nor in the databases and logs of Prefect, MLflow and ourselves, nor on the console."""
    user, password = PLANTED["MLFLOW_TRACKING_USERNAME"], PLANTED["MLFLOW_TRACKING_PASSWORD"]
    wanted = {name: value.encode() for name, value in PLANTED.items()}
    wanted |= {"basic": base64.b64encode(f"{user}:{password}".encode()), "known": finished.first["sample"].encode()}
    found: dict[str, set[str]] = {name: set() for name in wanted}
    for folder in (finished.home, Path(finished.root)):
        for path in folder.rglob("*"):
            data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            for name, value in wanted.items():
                if value in data:
                    found[name].add(str(path.relative_to(folder)))
    seen = found.pop("known")
    assert {"mlflow.db", "prefect.db"} <= {Path(name).name.removesuffix("-wal") for name in seen}, seen
    assert not any(found.values()), found
    console = "".join(finished.console)
    assert finished.first["sample"] in console and "planted-" not in console


def test_the_last_lines_are_what_a_run_is_for(finished: Workplace) -> None:
    out, errors = finished.console
    last = out.splitlines()[-40:]
    said = out + errors
    for score in ("class_consistency", "frechet_efficientnet_lite0", "real images"):
        (line,) = (line for line in last if re.search(rf"(^|\s){score}\b", line))
        assert len(line) <= 80
    told = {line.split()[0]: line.split(maxsplit=1)[1] for line in last if re.match(r"[a-zA-Z]+ +\S", line)}
    assert list(told)[-7:] == ["result", "page", "picture", "run", "further", "time", "MLflow"]
    assert Path(told["picture"]).suffix == ".png" and Path(told["picture"]).is_file()
    assert Path(told["page"]).read_text().startswith("<!doctype html>")
    assert told["run"] in told["MLflow"] and told["run"] in told["further"]
    for stage in ALL:
        assert said.count(f" made {stage}: ") == said.count(f" running {stage} ") == 1, stage
    assert not re.search(r"Traceback|core_worker|\(\w+ pid=\d+|WARNING", said)


def test_the_same_again_is_all_cached(finished: Workplace) -> None:
    before = finished.manifests()
    finished.run()
    assert finished.manifests() == before


@pytest.mark.slow  # the same law is shown through a server in test_deployment
def test_another_guidance_scale_samples_and_scores_only(finished: Workplace) -> None:
    before = finished.manifests()
    finished.run("--set", "sample.guidance.scale=3.0")
    assert finished.rebuilt_since(before) == {"sample", "evaluate", "report"}


@pytest.mark.slow  # the same law is shown on toy stages in test_redo
def test_a_deleted_artifact_is_rebuilt_and_nothing_upstream(finished: Workplace) -> None:
    before = finished.manifests()
    shutil.rmtree(Path(finished.root) / "sample" / finished.first["sample"])
    finished.run()
    assert finished.rebuilt_since(before) == {"sample"}
    assert finished.manifests().keys() == before.keys()


@pytest.mark.slow
def test_force_redoes_one_stage_and_from_all_that_follow(finished: Workplace) -> None:
    before = finished.manifests()
    finished.run("--from", "evaluate", "--force", "sample")
    assert finished.rebuilt_since(before) == {"evaluate", "report"}, "sample comes before --from and is kept"
    before = finished.manifests()
    finished.run("--force", "report")
    assert finished.rebuilt_since(before) == {"report"}


@pytest.mark.slow
def test_force_on_damaged_input_is_refused_and_loses_nothing(finished: Workplace) -> None:
    """And the options that it names mend it."""
    before = finished.manifests()
    lost = next((Path(finished.root) / "sample" / finished.first["sample"]).glob("**/part-*.parquet"))
    lost.unlink()
    refused = finished.run("--only", "evaluate", "--force", "evaluate", check=False)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert f"{lost.name} is missing, expected" in line
    mend = ["--only", "sample", "--force", "sample"]
    assert f"the same command with {' '.join(mend)} makes" in line
    assert finished.rebuilt_since(before) == set()
    finished.run(*mend)
    finished.run("--only", "evaluate", "--force", "evaluate")
    assert finished.rebuilt_since(before) == {"sample", "evaluate"}
    assert lost.exists() and not list(Path(finished.root).glob("*/*.new"))


def test_only_refuses_inputs_that_are_not_there(workplace: Workplace, tmp_path: Path) -> None:
    refused = workplace.run("--only", "sample", root=str(tmp_path), check=False)
    assert refused.returncode == 1
    assert "train_vavae" in refused.stderr and "not complete" in refused.stderr


def test_runs_are_tracked_and_compare(finished: Workplace) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("latentforge")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = [run for run in runs if run.data.tags.get("flow") == "sfd-full"]
    whole = [run for run in parents if all(run.data.tags.get(f"stage.{name}", "").startswith("made") for name in ALL)]
    assert len(whole) == 1 and whole[0].info.status == "FINISHED"
    assert whole[0].data.params["train_dit.clock.delta"] == "0.3"
    assert whole[0].data.tags["prefect_flow_run"]
    parent = whole[0].info.run_id
    children = {run.data.tags["stage"] for run in runs if run.data.tags.get("mlflow.parentRunId") == parent}
    assert children == ALL
    mine = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    (training,) = [run for run in mine if run.data.tags["stage"] == "train_dit"]
    assert len(client.get_metric_history(training.info.run_id, "loss/total")) > 1
    assert "evaluate/frechet_efficientnet_lite0" in whole[0].data.metrics
    assert json.loads(whole[0].data.params["sample.guidance.scale"]) == load_recipe("demo_tiny").sample.guidance.scale


@pytest.mark.slow  # stages on S3 have tests of their own
def test_a_root_goes_on_on_s3_without_servers(finished: Workplace, alone: Workplace, s3_root: str) -> None:
    """Shards and tokenizers were copied there; what follows is made there, by one worker of training."""
    import s3fs

    copied = ("shard", "train_vavae", "train_semvae")
    for stage in copied:
        place = f"{stage}/{finished.first[stage]}"
        s3fs.S3FileSystem().put(f"{finished.undisturbed}/{place}", f"{s3_root}/{place}", recursive=True)
    before = {stage: Artifact(s3_root, stage, finished.first[stage]).manifest.created for stage in copied}
    said = alone.run("--set", "compute.train.workers=1", root=s3_root).stdout
    assert f"{s3_root}/report/" in said and "report.html" in said
    for stage in ALL:
        made = Artifact(s3_root, stage, finished.first[stage]).manifest.created
        assert stage not in before or made == before[stage], "what was copied is used"
    assert not Path(alone.root).exists(), "nothing but tracking stays on the driver's disk"
    assert (alone.home / "mlflow.db").is_file()


@pytest.mark.slow  # what tests of the stages on S3 and the one above leave: tokenizers are trained there, too
def test_the_same_flow_on_s3_without_servers(alone: Workplace, s3_root: str) -> None:
    said = alone.run(root=s3_root).stdout
    assert f"{s3_root}/report/" in said and "report.html" in said
    found = Storage.at(s3_root)
    assert {name.split("/")[0] for name in found.names() if name.endswith("manifest.json")} >= ALL
    assert not Path(alone.root).exists(), "nothing but tracking stays on the driver's disk"
    assert (alone.home / "mlflow.db").is_file()
