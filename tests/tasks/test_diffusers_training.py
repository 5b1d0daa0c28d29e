"""A KL autoencoder of diffusers trained further by our objective, in the real loop: it resumes in every bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from tests.helpers.builders import at, put_shard, small_recipe
from tests.helpers.foreign import saved, section
from tests.tasks.test_train_tokenizers import Interrupted, alone, job, train

__all__ = ["alone"]
OVERRIDES = (
    "train_vavae.images=24",
    "train_vavae.batch=8",
    "train_vavae.learning_rate=0.001",
    "train_vavae.schedule=constant",
    "train_vavae.objective={gan_weight: 0.5, gan_start: 8, discriminator: {width: 4, layers: 2}, align_weight: 0.5}",
    "foundation={weights: random}",
    "compute.train={workers: 1, engine: plain, checkpoint_every: 8, keep_checkpoints: 100, log_every: 8}",
)


def test_diffusers_kl_is_trained_further_and_resumes_in_every_bit(alone: None, tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "AutoencoderKL")
    model = f"train_vavae.model={json.dumps(section('AutoencoderKL', tmp_path / 'theirs'))}"
    recipe, root = small_recipe(*OVERRIDES, model), at(tmp_path / "root")
    put_shard(root, recipe, train=40, test=10)
    whole, stopped = job(root, recipe, name="whole"), job(root, recipe, name="stopped")
    train(whole)
    with pytest.raises(Interrupted):
        train(stopped, stop_at=8)
    train(stopped)
    ours, resumed = (load(each.out.read_bytes("model.safetensors")) for each in (whole, stopped))
    assert all(torch.equal(value, resumed[name]) for name, value in ours.items())  # the files' headers name the run
    before = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    after = load_file(Path(whole.out.path) / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(value, before[name]) for name, value in after.items()), "every weight has learned"
    assert json.loads(whole.out.read_bytes("config.json"))["_class_name"] == "AutoencoderKL"
