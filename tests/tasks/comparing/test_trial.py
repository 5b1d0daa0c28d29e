"""Trials: scores without stored images are those of the stages, from the moment of training that is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from configs import UserError
from infra.artifacts import Artifact
from tasks import evaluate, sample, snapshots
from tasks.comparing import trial
from tasks.comparing.trial import Snapshot, trial_job
from tasks.networks import EMA_WEIGHTS
from tasks.scoring.real_images import RealImages, ScoringInputs, real_images
from tasks.stage import Job, perform
from tests.helpers.builders import at, context, put, put_networks, put_shard, small_recipe

INPUTS = ("train_vavae", "encode", "train_dit")
OVERRIDES = ("sample.images=100", "sample.batch=40", "evaluate.images=100", "evaluate.bootstrap=0")
RECIPE = small_recipe(*OVERRIDES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    folder = at(tmp_path_factory.mktemp("trials"))
    put_shard(folder, RECIPE)
    put_networks(folder, RECIPE)
    return folder


@pytest.fixture(scope="module")
def real(root: str, local_ray: None, actors_here: None) -> RealImages:
    return real_images(ScoringInputs(RECIPE, root, Artifact(root, "shard", "shard")))


def job(root: str, real: RealImages, at: Snapshot | None = None, *overrides: str) -> Job:
    recipe = small_recipe(*OVERRIDES, *overrides)
    return trial_job(recipe, root, {name: Artifact(root, name, name) for name in INPUTS}, real, at)


def test_a_trials_scores_are_those_of_sample_and_evaluate(root: str, real: RealImages) -> None:
    made = perform(trial.STAGE, job(root, real))
    images = perform(sample.STAGE, context(root, RECIPE, sample.STAGE, *INPUTS).job)
    whole = perform(evaluate.STAGE, context(root, RECIPE, evaluate.STAGE, shard="shard", sample=images.fingerprint).job)
    assert made.manifest.rows == 100 and made.read(trial.SHEET).startswith(b"\x89PNG")
    assert made.manifest.scores.keys() >= {"class_consistency", "frechet_efficientnet_lite0"}
    for name, value in made.manifest.scores.items():
        assert value == pytest.approx(whole.manifest.scores[name], rel=1e-9), name
    for name, value in real.floor.items():
        assert value == pytest.approx(whole.manifest.scores[f"floor_{name}"], rel=1e-9), name


def test_a_moment_takes_the_stored_average(root: str, real: RealImages) -> None:
    model = Artifact(root, "train_dit", "train_dit")
    late = load(model.read(EMA_WEIGHTS))
    early = {name: tensor * 0.5 for name, tensor in late.items()}
    stored = [
        model.storage.write_bytes(snapshots.snapshot_file(images, sigma), save(weights))
        for images, weights in ((320, early), (640, late))
        for sigma in (0.05, 0.1)
    ]
    put(root, RECIPE, "train_dit", [*model.manifest.files, *stored], facts=model.manifest.facts)
    model = Artifact(root, "train_dit", "train_dit")
    assert snapshots.taken_at(model, 0.1) == [320, 640] and snapshots.taken_at(model, 0.2) == []
    trial._model.cache_clear()
    plain, whole, half = (
        perform(trial.STAGE, job(root, real, at)).manifest.scores["frechet_efficientnet_lite0"]
        for at in (None, Snapshot(640, 0.1), Snapshot(320, 0.1))
    )
    assert whole == pytest.approx(plain, rel=1e-3) and half != pytest.approx(plain, rel=1e-3)


def test_another_setting_is_another_trial_and_keeps_what_is_loaded(root: str, real: RealImages) -> None:
    one, other = job(root, real), job(root, real, None, "sample.guidance.scale=4.0")
    assert one.fingerprint != other.fingerprint
    loads = trial._model.cache_info().misses
    perform(trial.STAGE, other)
    perform(trial.STAGE, job(root, real, None, "sample.guidance={method: none}"))
    assert trial._model.cache_info().misses <= loads + 1, "one model serves all settings"


def test_a_model_of_other_latents_is_refused(root: str, real: RealImages) -> None:
    model = Artifact(root, "train_dit", "train_dit")
    put(root, RECIPE, "train_dit", list(model.manifest.files), "stranger", facts={"statistics_hash": "0" * 16})
    wrong = job(root, real)
    wrong = replace(wrong, fingerprint="stranger", inputs={**wrong.inputs, "train_dit": "stranger"})
    with pytest.raises(UserError, match="0000000000000000"):
        perform(trial.STAGE, wrong)


def test_rows_are_put_together_in_order_whatever_they_come_in() -> None:
    pieces = [(np.arange(start, start + 7), np.zeros((7, 2, 2, 3), np.uint8)) for start in range(0, 49, 7)]
    found = [labels for labels, _ in trial._batched(pieces, 10)]
    assert [len(labels) for labels in found] == [10, 10, 10, 10, 9]
    assert np.concatenate(found).tolist() == list(range(49))
