"""Sampling: an image depends on its seed and index alone, parts resume, mistakes are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from configs import Recipe, UserError
from infra.artifacts import Artifact
from tasks import sample
from tasks.networks import build_dit
from tasks.sample import STAGE
from tasks.sampling.per_image import image_labels, image_noise, shown_per_class
from tasks.sampling.sampler import Sampler
from tasks.stage import Context, perform
from tests.helpers.builders import at, context, put, put_networks, small_recipe

INPUTS = ("train_vavae", "encode", "train_dit")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prepared(folder: Path, *overrides: str) -> tuple[Context, Recipe]:
    recipe = small_recipe(*overrides)
    put_networks(at(folder), recipe)
    return context(at(folder), recipe, STAGE, *INPUTS), recipe


def sampler(folder: Path, *overrides: str) -> Sampler:
    return Sampler.of(prepared(folder, *overrides)[0])


# ----------------------------------------------------------------------------------- labels and random numbers


def test_balanced_labels_are_balanced_in_every_stretch() -> None:
    labels = image_labels("balanced", np.arange(35, 95), classes=10, seed=0)
    assert np.bincount(labels, minlength=10).tolist() == [6] * 10


def test_random_labels_depend_on_seed_and_index_alone() -> None:
    whole = image_labels("random", np.arange(2_000), classes=10, seed=1)
    assert np.array_equal(image_labels("random", np.arange(500, 700), classes=10, seed=1), whole[500:700])
    assert not np.array_equal(image_labels("random", np.arange(2_000), classes=10, seed=2), whole)
    assert np.bincount(whole, minlength=10).min() > 150


def test_unknown_label_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="balanced"):
        image_labels("sorted", np.arange(3), classes=2, seed=0)  # type: ignore[arg-type]


def test_noise_belongs_to_the_image() -> None:
    whole = image_noise(np.arange(64), (8, 4, 4), seed=3)
    assert whole.shape == (64, 8, 4, 4) and whole.dtype == np.float32
    assert np.array_equal(image_noise(np.array([41, 7]), (8, 4, 4), seed=3), whole[[41, 7]])
    assert len({image.tobytes() for image in whole}) == 64
    assert not np.array_equal(image_noise(np.arange(64), (8, 4, 4), seed=4), whole)
    assert not np.array_equal(image_noise(np.arange(64), (8, 4, 4), seed=3, draw=1), whole)
    assert abs(float(whole.mean())) < 0.05 and abs(float(whole.std()) - 1) < 0.05


def test_a_picture_has_one_class_per_column() -> None:
    labels = np.array([2, 0, 1, 0, 2, 1, 0, 1])
    assert shown_per_class(labels, columns=3, rows=5) == [[1, 2, 0], [3, 5, 4]]
    many = image_labels("balanced", np.arange(3_000), classes=1_000, seed=0)
    assert [labels % 1_000 for labels in shown_per_class(many, columns=3, rows=1)[0]] == [0, 500, 999]


# -------------------------------------------------------------------------------------------------------- images


def test_images_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    ours = sampler(tmp_path)
    labels, images = ours.images(np.arange(12))
    assert labels.tolist() == [*range(10), 0, 1]
    assert images.shape == (12, 32, 32, 3) and images.dtype == np.uint8
    order = np.array([11, 3, 7, 0])
    again = ours.images(order)[1]
    # Another batch size sums in another order: a level may round the other way, nothing more.
    assert np.abs(again.astype(int) - images[order].astype(int)).max() <= 1
    assert len({image.tobytes() for image in images}) == 12


def test_a_label_and_a_seed_make_a_difference(tmp_path: Path) -> None:
    one = sampler(tmp_path).images(np.arange(4))[1]
    other = sampler(tmp_path, "sample.seed=1").images(np.arange(4))[1]
    stronger = sampler(tmp_path, "sample.guidance.scale=6.0").images(np.arange(4))[1]
    assert not np.array_equal(one, other) and not np.array_equal(one, stronger)


@pytest.mark.parametrize("solver", ["heun", "dopri5", "sde"])
def test_every_solver_gives_pictures(tmp_path: Path, solver: str) -> None:
    ours = sampler(tmp_path, f"sample.solver={solver}", "sample.guidance={method: none}")
    _, images = ours.images(np.arange(2))
    assert images.shape == (2, 32, 32, 3)
    assert np.array_equal(ours.images(np.arange(2))[1], images)


def test_autoguidance_by_the_model_itself_is_no_guidance(tmp_path: Path) -> None:
    plain = sampler(tmp_path, "sample.guidance={method: none}")
    weights = tmp_path / "weak.safetensors"
    recipe = plain.recipe
    main = Artifact(at(tmp_path), "train_dit", "train_dit").read("ema.safetensors")
    weights.write_bytes(main)
    model = recipe.train_dit.model.model_dump(mode="json")
    guidance = {"method": "autoguidance", "scale": 3.0, "weights": str(weights), "model": model}
    guided = sampler(tmp_path, f"sample.guidance={guidance!r}".replace("None", "null").replace("True", "true"))
    expected, found = (each.images(np.arange(3))[1].astype(int) for each in (plain, guided))
    assert np.abs(expected - found).max() <= 1

    torch.manual_seed(7)
    other = build_dit(recipe, recipe.train_dit.model)
    torch.nn.init.normal_(next(iter(other.final_layer.parameters())))
    save_file(other.state_dict(), weights)
    changed = sampler(tmp_path, f"sample.guidance={guidance!r}".replace("None", "null").replace("True", "true"))
    assert not np.array_equal(changed.images(np.arange(3))[1], guided.images(np.arange(3))[1])


def test_another_weak_guide_is_another_sample(tmp_path: Path) -> None:
    weights = tmp_path / "weak.safetensors"
    guidance = f"{{method: autoguidance, scale: 2.0, weights: {weights}, model: {{size: S}}}}"
    recipe = small_recipe(f"sample.guidance={guidance}")
    weights.write_bytes(b"one")
    one = STAGE.fingerprint(recipe, {})[0]
    weights.write_bytes(b"two")
    assert STAGE.fingerprint(recipe, {})[0] != one
    weights.unlink()
    with pytest.raises(UserError, match=r"weak\.safetensors: does not exist"):
        STAGE.fingerprint(recipe, {})


@pytest.mark.slow
def test_compiled_networks_make_the_same_pictures(tmp_path: Path) -> None:
    eager, compiled = (
        sampler(tmp_path, f"compute.actors.compile={flag}").images(np.arange(20))[1].astype(int)
        for flag in ("false", "true")
    )
    assert np.abs(eager - compiled).max() <= 2


# --------------------------------------------------------------------------------------------------------- stage


def test_model_and_latents_of_different_runs_are_refused(tmp_path: Path) -> None:
    job, recipe = prepared(tmp_path)
    files = list(Artifact(at(tmp_path), "train_dit", "train_dit").manifest.files)
    put(at(tmp_path), recipe, "train_dit", files, facts={"statistics_hash": "0123456789abcdef"})
    with pytest.raises(UserError, match="0123456789abcdef"):
        perform(STAGE, job.job)


def test_the_stage_resumes_and_equals_an_undisturbed_run(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_ROWS_PER_PART", 20)
    job, _ = prepared(tmp_path, "sample.images=50")
    artifact = perform(STAGE, job.job)
    manifest = artifact.manifest
    parts = artifact.files(suffix=".parquet")
    assert manifest.rows == 50 and [part.rows for part in parts] == [20, 20, 10]
    table = pq.read_table(Path(artifact.uri.removeprefix("file://")) / parts[2].path)
    assert table["index"].to_pylist() == list(range(40, 50))
    assert table["label"].to_pylist() == list(range(10))
    assert table.schema.field("image").metadata == {b"shape": b"[32, 32, 3]", b"dtype": b"uint8"}
    assert artifact.read("grid.png").startswith(b"\x89PNG")
    by_itself = Sampler.of(job).images(np.arange(40, 60))[1][:10]  # here, while two actors made the parts
    stored = np.frombuffer(b"".join(table["image"].to_pylist()), np.uint8).reshape(by_itself.shape)
    assert np.array_equal(stored, by_itself)

    artifact.storage.delete("manifest.json")
    artifact.storage.delete(parts[1].path)
    kept = Path(artifact.uri.removeprefix("file://")) / parts[0].path
    before = kept.stat().st_mtime_ns
    again = perform(STAGE, job.job)
    assert kept.stat().st_mtime_ns == before, "a finished part is not sampled again"
    assert [entry.sha256 for entry in again.manifest.files] == [entry.sha256 for entry in manifest.files]
