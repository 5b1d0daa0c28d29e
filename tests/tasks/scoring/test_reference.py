"""What a sample is compared with: a split, ADM's file or an earlier artifact, and nothing that does not fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import Recipe, UserError
from infra.artifacts import Artifact
from tasks import evaluate
from tasks.evaluate import STAGE
from tasks.scoring.adm_file import read_statistics
from tasks.scoring.features import ImageFeatures, PerImageFeatures
from tasks.scoring.gaussian import Gaussian
from tasks.scoring.inception import Identity
from tasks.scoring.real_images import has_both, on_record
from tasks.scoring.reference import external, looked_at, resolve
from tasks.stage import perform
from tests.helpers.builders import at, context, drawing, put, put_sample, put_shard, small_recipe
from tests.helpers.inceptions import put_inception

PLAIN = ("evaluate.classifier=null",)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_inception(tmp_path_factory.mktemp("inception"))


def pictures(count: int, seed: int, side: int = 32) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([drawing(label % 10, random, side=side) for label in range(count)])


def file(folder: Path, **arrays: Any) -> Path:
    path = folder / "reference.npz"
    np.savez(path, **arrays)
    return path


def with_statistics(path: Path, **others: Any) -> Path:
    return file(path, mu=np.zeros(2048), sigma=np.eye(2048), **others)


def against(reference: object, *overrides: str) -> Recipe:
    return small_recipe(*PLAIN, f"evaluate.reference={reference}", *overrides)


# ----------------------------------------------------------------------------------------------------- resolving


def test_a_split_is_its_own_name_and_the_other_one_is_the_floor() -> None:
    assert external(small_recipe()) == {"reference": "test"}
    assert resolve(small_recipe()).floor_split == "train"
    assert resolve(against("train")).floor_split == "test"


def test_another_file_is_another_evaluation(tmp_path: Path, weights: Path) -> None:
    path = file(tmp_path, arr_0=pictures(4, 0))
    recipe = against(path)
    before = STAGE.fingerprint(recipe, {})[0]
    file(tmp_path, arr_0=pictures(4, 1))
    assert STAGE.fingerprint(recipe, {})[0] != before
    published = against(path, f"evaluate.inception={{weights: {weights}}}")
    assert external(published)["inception"] == Identity.at(str(weights)).sha256


def test_a_file_of_statistics_alone_stands_beside_the_test_split(tmp_path: Path, weights: Path) -> None:
    path = with_statistics(tmp_path)
    with pytest.raises(UserError, match=r"evaluate\.inception is not set"):
        resolve(against(path))
    found = resolve(against(path, f"evaluate.inception={{weights: {weights}}}"))
    assert found.split == "test" and found.statistics is not None and set(found.statistics.gaussians) == {"pool"}


def test_what_does_not_fit_the_recipe_is_refused(tmp_path: Path, weights: Path) -> None:
    published = f"evaluate.inception={{weights: {weights}}}"
    with pytest.raises(UserError, match=r"4 images are 16 × 16 pixels, but image\.size is 32"):
        resolve(against(file(tmp_path, arr_0=pictures(4, 0, side=16))))
    with pytest.raises(UserError, match="statistics are of the network abcd"):
        resolve(against(with_statistics(tmp_path, network=np.array("abcd")), published))
    with pytest.raises(UserError, match="another network"):
        resolve(against(file(tmp_path, mu=np.zeros(64), sigma=np.eye(64)), published))
    with pytest.raises(UserError, match="does not exist"):
        resolve(against(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no such thing")
    with pytest.raises(UserError, match="damaged"):
        resolve(against(tmp_path / "text.npz"))
    with pytest.raises(UserError, match="expected test, train, a file"):
        resolve(against("validation"))
    with pytest.raises(UserError, match="not complete"):
        resolve(against(f"{at(tmp_path)}/reference/0123456789abcdef"))


def test_statistics_of_a_file_go_before_those_of_the_images(tmp_path: Path, weights: Path) -> None:
    recipe = against(with_statistics(tmp_path), f"evaluate.inception={{weights: {weights}}}")
    vectors = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    columns = {"pool": np.resize(vectors, (5, 2048)), "spatial": np.resize(vectors, (5, 2023))}
    looked = ImageFeatures.of(PerImageFeatures(np.zeros(5, np.int64), vectors, **columns))
    found = evaluate.with_statistics(looked, resolve(recipe))
    assert found.gaussians.keys() == {"features", "pool"}, "a file without spatial statistics gives no sFID"
    assert np.array_equal(found.gaussians["pool"].covariance, np.eye(2048))
    assert found.gaussians["features"] is looked.gaussians["features"]
    assert evaluate.with_statistics(looked, resolve(small_recipe())) is looked


def test_what_another_judge_saw_of_a_reference_is_not_compared(tmp_path: Path) -> None:
    root, vectors = at(tmp_path), np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    looked = ImageFeatures.of(PerImageFeatures(np.zeros(5, np.int64), vectors, judged=vectors[:, :3]))
    folder = Artifact(root, "reference", "kept").storage
    gaussians = {
        f"{name}_{part}": getattr(each, part)
        for name, each in looked.gaussians.items()
        for part in ("mean", "covariance")
    }
    files = {
        "found.npz": {"labels": np.zeros(5, np.int64), "features": vectors, "judged": vectors[:, :3]},
        "gaussians.npz": {"images": 5, **gaussians},
    }
    entries = []
    for name, arrays in files.items():
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        entries.append(folder.write_bytes(name, buffer.getvalue()))
    kept = put(root, small_recipe(), "reference", entries, "kept", inputs={"judge": "ours"})
    ours, others = (on_record(kept, Artifact(root, "judge", name)) for name in ("ours", "others"))
    np.testing.assert_array_equal(ours.gaussians["judged"].mean, looked.gaussians["judged"].mean)
    assert others.gaussians.keys() == on_record(kept, None).gaussians.keys() == {"features"}
    assert has_both("judged", ours, looked) and not has_both("judged", others.first(3), looked)


def test_a_file_of_statistics_leaves_the_judge_its_own(tmp_path: Path, weights: Path) -> None:
    recipe = against(with_statistics(tmp_path), f"evaluate.inception={{weights: {weights}}}")
    vectors = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    columns = {"pool": np.resize(vectors, (5, 2048)), "judged": vectors[:, :3]}
    looked = ImageFeatures.of(PerImageFeatures(np.zeros(5, np.int64), vectors, **columns))
    found = evaluate.with_statistics(looked, resolve(recipe))
    assert found.gaussians["judged"] is looked.gaussians["judged"]


# -------------------------------------------------------------------------------------------------- evaluations


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, weights: Path, actors_here: None) -> tuple[Artifact, Artifact]:
    """The evaluation of a few pictures against a file of images, and against the artifact which that left."""
    folder = tmp_path_factory.mktemp("scored")
    path = file(folder, arr_0=pictures(8, 1))
    settings = (f"evaluate.inception={{weights: {weights}}}", "evaluate.images=8", "evaluate.bootstrap=4")
    recipe = against(path, *settings)
    put_shard(at(folder), recipe, train=12, test=12)
    put_sample(at(folder), recipe, pictures(8, 2), np.arange(8))
    first = perform(STAGE, context(at(folder), recipe, STAGE, "shard", "sample").job)
    (kept,) = (folder / "reference").iterdir()
    again = against(f"{at(folder)}/reference/{kept.name}", *settings)
    return first, perform(STAGE, context(at(folder), again, STAGE, "shard", "sample").job)


def test_unverified_weights_give_every_score_under_its_own_name(scored: tuple[Artifact, Artifact]) -> None:
    manifest = scored[0].manifest
    published = ("frechet", "spatial_frechet", "kernel_distance", "class_score", "precision", "recall")
    expected = {f"{name}_inception_unverified" for name in published}
    assert expected | {f"floor_{name}" for name in expected} <= manifest.scores.keys()
    assert not [name for name in manifest.scores if name.endswith(("fid", "kid", "inception_score"))]
    assert manifest.facts["inception"]["genuine"] is False
    assert manifest.facts["images"] == {"generated": 8, "test": 8, "floor": 8}
    for name, (low, high) in manifest.facts["intervals"].items():
        assert low <= manifest.scores[name] <= high, name
    assert {"frechet_inception_unverified", "frechet_efficientnet_lite0"} <= manifest.facts["intervals"].keys()


def test_an_earlier_artifact_gives_the_same_scores_as_what_it_was_made_from(scored: tuple[Artifact, Artifact]) -> None:
    first, again = (artifact.manifest.scores for artifact in scored)
    assert first == again


def test_the_reference_is_kept_in_adms_layout(scored: tuple[Artifact, Artifact]) -> None:
    folder = Path(scored[0].root.removeprefix("file://")) / "reference"
    (path,) = folder.glob("*/statistics.npz")
    found = read_statistics(path, {"pool": 2048, "spatial": 2023})
    with np.load(path.with_name("found.npz")) as columns:
        again = Gaussian.of(columns["pool"])
    pool, variance = found.gaussians["pool"], np.trace(again.covariance) / len(again.mean)
    np.testing.assert_allclose(pool.mean, again.mean, rtol=0, atol=1e-6 * np.sqrt(variance))
    np.testing.assert_allclose(pool.covariance, again.covariance, rtol=0, atol=1e-6 * variance)
    assert found.network == scored[0].manifest.facts["inception"]["sha256"]


def test_an_artifact_of_other_features_is_refused(scored: tuple[Artifact, Artifact], weights: Path) -> None:
    (kept,) = (Path(scored[0].root.removeprefix("file://")) / "reference").iterdir()
    reference = f"{scored[0].root}/reference/{kept.name}"
    with pytest.raises(UserError, match="looked at with inception"):
        resolve(against(reference))
    published = f"evaluate.inception={{weights: {weights}}}"
    other = against(reference, published, "evaluate.features.input_size=32")
    assert looked_at(other)["features"]["input_size"] == 32
    with pytest.raises(UserError, match="looked at with features"):
        resolve(other)
