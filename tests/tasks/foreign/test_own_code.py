"""A tokenizer of one's own: whose code runs, that it is the code that was hashed, and the road it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs import Recipe, UserError
from configs.autoencoders import PythonModel
from infra import trust
from tasks import train_vavae
from tasks.foreign import own_code
from tasks.networks import trained_autoencoder
from tests.helpers.builders import at, put_shard, small_recipe
from tests.helpers.piles import run_stage

SOURCE = """
import torch
import torch.nn.functional as F

class Blocks(torch.nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def encode(self, images):
        return self.scale * F.avg_pool2d(images, 4), torch.full_like(F.avg_pool2d(images, 4), 0.5)

    def decode(self, latents):
        return F.interpolate(latents / self.scale, scale_factor=4.0)

    def latent_shape(self, side):
        return 3, side // 4
"""
BASE = (
    "train_semvae=null", "foundation=null", "train_vavae.images=0", "train_vavae.objective.align_weight=0.0",
    "train_dit.clock={kind: synchronous}", "sample.guidance={method: none}",
    "train_dit.objective.semantic_weight=1.0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_TRUSTED", set())


def own(folder: Path, source: str = SOURCE, **changes: Any) -> Recipe:
    (folder / "mine.py").write_text(source)
    model = {
        "kind": "python",
        "file": str(folder / "mine.py"),
        "class_name": "Blocks",
        "trusted": True,
        "channels": 3,
        "downscale": 4,
    }
    return small_recipe(*BASE, f"train_vavae.model={json.dumps(model | changes)}")


def refused(recipe: Recipe) -> str:
    with pytest.raises(UserError) as refusal:
        train_vavae.check(recipe)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@torch.no_grad()
def test_it_goes_the_road_of_every_tokenizer(tmp_path: Path) -> None:
    recipe, root = own(tmp_path, options={"scale": 2.0}), at(tmp_path / "root")
    train_vavae.check(recipe)
    shard = put_shard(root, recipe, train=20, test=10)
    artifact = run_stage(train_vavae.STAGE, recipe, root, shard)
    assert artifact.manifest.scores["psnr"] > 10
    network, images = trained_autoencoder(artifact), torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = network.encode(images)
    torch.testing.assert_close(posterior.mean, 2 * torch.nn.functional.avg_pool2d(images, 4))
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.mean, 0.5))
    torch.testing.assert_close(network.decode(posterior.mean)[:, :, ::4, ::4], posterior.mean / 2)


@torch.no_grad()
def test_weights_come_from_a_safe_file_by_the_modules_names(tmp_path: Path) -> None:
    save_file({"scale": torch.tensor(3.0)}, tmp_path / "mine.safetensors")
    recipe, root = own(tmp_path, weights=str(tmp_path / "mine.safetensors")), at(tmp_path / "root")
    train_vavae.check(recipe)
    artifact = run_stage(train_vavae.STAGE, recipe, root)
    assert float(trained_autoencoder(artifact).kept.state_dict()["scale"]) == 3.0
    save_file({"stranger": torch.tensor(3.0)}, tmp_path / "mine.safetensors")
    assert "scale" in (said := refused(recipe)) and "stranger" in said and "train_vavae.model.weights" in said


def test_code_and_weights_name_the_artifact(tmp_path: Path) -> None:
    prints = [train_vavae.STAGE.fingerprint(own(tmp_path, source), {})[0] for source in (SOURCE, SOURCE + "#", SOURCE)]
    assert prints[0] == prints[2] != prints[1]
    weights = tmp_path / "mine.safetensors"
    for value in (1.0, 2.0):
        save_file({"scale": torch.tensor(value)}, weights)
        prints.append(train_vavae.STAGE.fingerprint(own(tmp_path, weights=str(weights)), {})[0])
    assert len(set(prints)) == 4


def test_an_artifact_cannot_make_code_run(tmp_path: Path) -> None:
    """Only a job whose own recipe names the file can; and code that changed since is not what the artifact is of."""
    recipe, root = own(tmp_path), at(tmp_path / "root")
    artifact = run_stage(train_vavae.STAGE, recipe, root)
    trust._TRUSTED.clear()
    marker = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(marker)!r}, 'w')\n" + SOURCE)
    with pytest.raises(UserError, match=r"mine.py is code, and no recipe of this run names it"):
        trained_autoencoder(artifact)
    trust.trust(recipe.model_dump(mode="json"))
    with pytest.raises(UserError, match=r"mine.py has changed since its artifact was made"):
        trained_autoencoder(artifact)
    assert not marker.exists()
    assert isinstance(recipe.train_vavae.model, PythonModel)
    own_code.build(recipe.train_vavae.model)
    assert marker.exists(), "trusted and unpinned code runs"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trusted": False}, "kind is python, so the code of .*mine.py would run, but trusted is False"),
        ({"file": "s3://bucket/mine.py"}, "code is never fetched; save it and give its path"),
        ({"channels": 3, "stranger": 1}, "no such field"),
    ],
)
def test_recipes_that_may_not_run_code_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        own(tmp_path, **changes)


def test_own_code_is_not_trained(tmp_path: Path) -> None:
    own(tmp_path)
    model = {"kind": "python", "file": "/x.py", "class_name": "Blocks", "trusted": True, "channels": 3, "downscale": 4}
    with pytest.raises(UserError, match="our objective trains no Blocks, only AutoencoderKL"):
        small_recipe(*BASE, "train_vavae.images=64", f"train_vavae.model={json.dumps(model)}")


def test_broken_contracts_are_refused_before_anything_runs(tmp_path: Path) -> None:
    assert "latent_shape(32) is (3, 8), but channels and downscale of the recipe make it (3, 4)" in refused(
        own(tmp_path, downscale=8)
    )
    assert "has no latent_shape" in refused(own(tmp_path, SOURCE.replace("latent_shape", "shape")))
    assert "breaks its contract (round trip)" in refused(own(tmp_path, SOURCE.replace("(latents", "(-latents")))
    assert "SyntaxError" in refused(own(tmp_path, "class"))
    assert "AttributeError" in refused(own(tmp_path, class_name="Other"))
    assert "TypeError" in refused(own(tmp_path, options={"nosuch": 1}))
    assert "expected a torch.nn.Module, found list" in refused(own(tmp_path, "Blocks = list"))
    recipe = own(tmp_path)
    (tmp_path / "mine.py").unlink()
    assert "cannot be read (No such file or directory)" in refused(recipe)


def test_the_command_tells_every_promise(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from flows.weights import app

    own(tmp_path)
    recipe = tmp_path / "mine.yaml"
    model = {"kind": "python", "file": str(tmp_path / "mine.py"), "class_name": "Blocks", "trusted": True}
    sizes = {"channels": 3, "downscale": 4}
    recipe.write_text(
        "extends: demo_tiny\ntrain_semvae: null\nfoundation: null\ntrain_dit: null\nsample: null\n"
        f"train_vavae: {{images: 0, objective: {{align_weight: 0}}, model: {json.dumps(model | sizes)}}}\n"
    )
    done = CliRunner().invoke(app, ["tokenizer", "--recipe", str(recipe)], catch_exceptions=False)
    assert done.exit_code == 0 and done.output.count("yes") == 7 and "round trip" in done.output
    (tmp_path / "mine.py").write_text(SOURCE.replace("(latents", "(-latents"))
    with pytest.raises(UserError, match="the tokenizer of mine breaks its contract: round trip"):
        CliRunner().invoke(app, ["tokenizer", "--recipe", str(recipe)], catch_exceptions=False)
