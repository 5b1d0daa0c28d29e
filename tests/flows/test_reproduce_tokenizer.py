"""From a released tokenizer and validation images to its published scores beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from configs import UserError, load_recipe
from configs.published import departures
from configs.reproduction import reproduction
from flows.plan import make_plan
from flows.reproduce import result_of, verdict
from flows.run import preflight
from flows.summary import show_reproduction
from infra.artifacts import Artifact
from tasks.dag import reproducing, stages_of
from tasks.networks import build_autoencoder
from tests.flows.conftest import Workplace
from tests.helpers.builders import at, put
from tests.helpers.inceptions import put_inception
from tests.helpers.piles import folder_of_classes
from tests.helpers.published import save_tokenizer

NAMES = ["ldm_f16d32", "vavae_f16d32"]
IMAGES = 24


def put_released(folder: Path) -> Path:
    """A tokenizer as its authors leave it, validation images in folders of classes, and a recipe that names them."""
    torch.manual_seed(3)
    save_tokenizer(folder / "vavae.ckpt", build_autoencoder(load_recipe("vavae_tiny").train_vavae.model).state_dict())
    folder_of_classes(folder / "val", {f"n{number}": IMAGES // 2 for number in range(2)})
    values = {
        "extends": "vavae_tiny",
        **dict.fromkeys(("train_semvae", "train_dit", "sample")),
        "data": {
            "source": {"kind": "folder", "path": str(folder / "train"), "test_path": str(folder / "val")},
            "classes": 2,
        },
        "evaluate": {"inception": {"weights": str(put_inception(folder))}, "classifier": None},
        "evaluate_tokenizer": {
            "images": IMAGES,
            "posterior": "sample",
            "crop": "torchvision",
            "lpips_weights": "random",
            "density_points": 16,
        },
        "published": {
            "source": "a test",
            "tokenizer": {"rfid": 0.28, "psnr": 27.96, "lpips": 0.096, "ssim": 0.79},
            "released": {"tokenizer": str(folder / "vavae.ckpt")},
            "protocol": {"evaluate_tokenizer.images": 50_000, "evaluate_tokenizer.posterior": "sample"},
        },
    }
    (folder / "released.yaml").write_text(yaml.safe_dump(values))
    return folder / "released.yaml"


@pytest.mark.slow  # the parts are tested by themselves; this is the command
def test_a_released_tokenizer_leads_to_its_table(workplace: Workplace, tmp_path: Path) -> None:
    recipe, root = put_released(tmp_path), tmp_path / "root"
    done = workplace.flows("reproduce", str(recipe), "--root", str(root))
    made = {path.parts[-3] for path in root.glob("*/*/manifest.json")}
    assert made == {"shard", "train_vavae", "evaluate_tokenizer"}
    (scored,) = root.glob("evaluate_tokenizer/*/manifest.json")
    scores = json.loads(scored.read_text())["scores"]
    assert scores["reconstruction_psnr"] > 0 and "reconstruction_fid" not in scores
    (row,) = [
        line for line in done.stdout.splitlines() if line.startswith("│ reconstruction_psnr") and "27.96" in line
    ][-1:]
    assert f"{scores['reconstruction_psnr']:.4g}" in row
    said = done.stdout.splitlines()[-1]
    assert said.startswith("verdict  reconstruction_psnr ") and "posterior sample, crop torchvision" in said
    assert said.endswith("Not as published: evaluate_tokenizer.images is 24, published with 50,000.")


def test_what_is_given_is_enough_before_anything_runs(tmp_path: Path) -> None:
    """No training images; what does not fit is told in a line."""
    recipe = str(put_released(tmp_path))

    def look(*overrides: str) -> None:
        changes = reproduction(recipe, overrides=overrides)
        preflight(stages_of(reproducing(recipe, changes)), recipe, changes, at(tmp_path / "root"))

    look()
    look(f"data.source.test_path={tmp_path}/val")
    with pytest.raises(UserError, match="nowhere"):
        look(f"data.source.test_path={tmp_path}/nowhere")
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(2)}}, tmp_path / "vavae.ckpt")
    with pytest.raises(UserError, match=r"vavae\.ckpt") as refused:
        look()
    assert "\n" not in str(refused.value) and not list((tmp_path / "root").rglob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_published_tokenizer_departs_from_nothing(name: str) -> None:
    changes = reproduction(name)
    recipe = load_recipe(name, changes)
    assert reproducing(name, changes) == "tokenizer-eval" and departures(recipe) == []
    assert recipe.train_vavae.images == 0 and recipe.evaluate_tokenizer.probe_images == 0
    assert (recipe.data.source.path, recipe.data.source.test_path) == ("imagenet/val", None)  # type: ignore[union-attr]
    assert recipe.evaluate_tokenizer.lpips_weights == "hub" and recipe.evaluate.inception is not None
    told = verdict(recipe, {"reconstruction_fid": 0.27, "reconstruction_psnr": 28.0}, "evaluate_tokenizer")
    assert told.startswith("reconstruction_fid 0.27, published 0.2") and told.endswith(
        "50,000 images. All as published."
    )
    look = load_recipe(name, reproduction(name, images=100))
    assert departures(look) == ["evaluate_tokenizer.images is 100, published with 50,000"]
    with pytest.raises(UserError, match=r"a tokenizer, which is not guided: leave out --unguided"):
        reproduction(name, unguided=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_knows_what_it_costs(name: str) -> None:
    plan = make_plan(name, cluster="aws", flow="reproduce")
    assert [each.work.stage for each in plan.stages] == ["shard", "train_vavae", "evaluate_tokenizer"]
    assert plan.stages[0].work.rows.value == 50_000 and 0.1 < plan.dollars < 20
    assert any("reconstruction_fid 0.2" in note for note in plan.notes)


def test_scores_stand_beside_the_published_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("vavae_f16d32", reproduction("vavae_f16d32"))
    scores = {"reconstruction_psnr": 27.9, "reconstruction_frechet_inception_unverified": 3.0}
    made: Artifact = put(at(tmp_path), recipe, "evaluate_tokenizer", [], scores=scores)
    found = result_of(made.manifest)
    assert {row.name: row.here for row in found.rows} == {
        "reconstruction_fid": None,
        "reconstruction_psnr": 27.9,
        "reconstruction_ssim": None,
        "reconstruction_lpips": None,
    }
    assert found.verdict.startswith("reconstruction_psnr 27.90, published 27.96 (-0.06); with posterior sample")
    show_reproduction(made.uri)
    shown = capsys.readouterr().out.splitlines()
    (row,) = [line for line in shown if line.startswith("│ reconstruction_psnr") and "-0.06" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["reconstruction_psnr", "27.96", "27.9", "-0.06"]
    assert shown[-1] == f"verdict  {found.verdict}"


def test_released_files_are_of_one_kind() -> None:
    with pytest.raises(UserError, match="a tokenizer: give one of the two"):
        load_recipe("vavae_f16d32", ["published.released.weights=w.pt"])
    with pytest.raises(UserError, match="a tokenizer: give one of the two"):
        load_recipe("lightningdit_xl_64ep", ["published.released.statistics=null"])
