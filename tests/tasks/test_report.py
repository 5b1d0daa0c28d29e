"""The report: one self-contained page with pictures, scores, curves and costs, for recipes with fewer stages too."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from configs import Recipe, UserError
from infra.artifacts import Artifact
from tasks.data.images import images, pick_images, read_labels
from tasks.networks import WEIGHTS, build_semantic_vae
from tasks.report import STAGE, _absent, _few, _losses, _why_absent
from tasks.sampling.per_image import shown_per_class
from tasks.stage import Context, perform
from tests.helpers.builders import (
    at,
    context,
    drawing,
    put,
    put_networks,
    put_sample,
    put_shard,
    put_weights,
    small_recipe,
)

CURVES = {
    "total": [[64 * step, 2.0 / step] for step in range(1, 20)],
    "kl": [[64 * step, 90.0] for step in range(1, 20)],
}
SCORES = {
    "frechet_efficientnet_lite0": 12.5,
    "fid": 2.5,
    "floor_frechet_efficientnet_lite0": 3.25,
    "precision_efficientnet_lite0": 0.71,
    "floor_precision_efficientnet_lite0": 0.83,
    "recall_efficientnet_lite0": 0.62,
    "floor_recall_efficientnet_lite0": 0.84,
    "reconstruction_psnr": 21.4,
    "reconstruction_frechet_efficientnet_lite0": 4.5,
}
PUBLISHED = (
    "published={source: A paper, guided: {fid: 2.1, fid_gpu: 2.2, sfid: 4.0}, unguided: {fid: 9.9}, "
    "protocol: {sample.solver: euler, sample.steps: 250}}"
)
JUDGED = {"class_consistency": 0.873, "floor_class_consistency": 0.951, "judge_accuracy": 0.912}


def prepared(folder: Path, recipe: Recipe, judged: bool) -> Context:
    """Artifacts of every stage of the recipe, the trained ones random, the scores made up."""
    root = at(folder)
    put_shard(root, recipe)
    put_networks(root, recipe)
    tokenizer = Artifact(root, "train_vavae", "train_vavae").manifest
    put(root, recipe, "train_vavae", list(tokenizer.files), facts={"curves": CURVES}, scores={"psnr": 21.4})
    shards = Artifact(root, "shard", "shard").manifest
    looked = {"source": {"lines": ["10 classes", "left out: 3 × no picture (.txt)"]}}
    put(root, recipe, "shard", list(shards.files), facts={**shards.facts, **looked})
    labels = np.arange(40) % 10
    random = np.random.default_rng(1)
    put_sample(root, recipe, np.stack([drawing(int(label), random, side=32) for label in labels]), labels)
    facts = {
        "network": "efficientnet_lite0",
        "images": {"generated": 40, "test": 120, "floor": 40},
        "intervals": {"frechet_efficientnet_lite0": [11.5, 14.0]} if judged else {},
        "consistency_by_label": [0.9, 1.0, 0.8, 0.25, 0.9, 1.0, 0.95, 0.85, None, 0.9] if judged else [],
    }
    put(root, recipe, "evaluate", [], facts=facts, scores=SCORES | (JUDGED if judged else {}))
    names = ["shard", "train_vavae", "encode", "train_dit", "sample", "evaluate"]
    if recipe.train_semvae is not None:
        assert recipe.foundation is not None
        network = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
        put_weights(root, recipe, "train_semvae", {WEIGHTS: network}, facts={"curves": CURVES})
        names.insert(2, "train_semvae")
    return context(root, recipe, STAGE, *names)


class References(HTMLParser):
    """Everything a page asks a browser to fetch, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Artifact:
    recipe = small_recipe("report.rows=3", "report.title=Shapes & <lines>", PUBLISHED)
    return perform(STAGE, prepared(tmp_path_factory.mktemp("reported"), recipe, judged=True).job)


def test_page_asks_for_nothing_from_outside(reported: Artifact) -> None:
    page = reported.read("report.html").decode()
    parser = References()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.found) == 4 and all(url.startswith("data:image/png;base64,") for url in parser.found)
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page


def test_page_tells_scores_beside_their_floor_costs_and_recipe(reported: Artifact) -> None:
    page = reported.read("report.html").decode()
    assert "Shapes &amp; &lt;lines&gt;" in page
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    assert (
        "frechet_efficientnet_lite0 distance of the feature distributions 12.500 11.500 to 14.000 3.250 lower" in text
    )
    assert "Class consistency 87.3 % real 95.1 %" in text
    assert "stripes 80.0 %" in text and "hoop 90.0 %" in text and "wedge 100" not in text
    for stage in ("shard", "train_vavae", "train_semvae", "encode", "train_dit", "sample", "evaluate"):
        assert f"{stage} 1.5 s" in text
    assert "semantic_first" in text and "torch" in text
    assert "Source 10 classes left out: 3 × no picture (.txt)" in text


def test_page_says_what_scores_of_few_images_are_worth(reported: Artifact) -> None:
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", reported.read("report.html").decode()))
    assert (
        "These scores say little: 40 images on one side" in text and "score 11.5 to 14 where this one has 12.5" in text
    )
    enough = {"generated": 600, "test": 2000}
    manifest = replace(reported.manifest, facts={"images": enough, "network": "x"}, scores={"frechet_x": 1.0})
    assert _few(manifest) == ""
    better = {"frechet_x": 1.0, "floor_frechet_x": 2.0}
    few = replace(manifest, facts={"images": {"generated": 30, "test": 600}, "network": "x"}, scores=better)
    assert "below the 2 of real images is chance" in _few(few)
    large = {**few.facts, "intervals": {"frechet_x": [5213.6, 5404.2]}}
    far = replace(few, facts=large, scores={"frechet_x": 5310.1})
    assert "score 5,214 to 5,404 where this one has 5,310. Look" in _few(far)


def test_page_names_classes_that_are_not_pictured(reported: Artifact) -> None:
    assert "Not pictured" not in reported.read("report.html").decode(), "all ten are"
    assert _absent([0, 2], 4) == [1, 3] and _absent([4, 4], 4) == []
    assert _why_absent(10, 10) == "report.columns says how many"
    assert "has no image" in _why_absent(14, 16), "more columns would not show them"


def test_page_puts_what_is_published_beside_what_is_here(reported: Artifact) -> None:
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", reported.read("report.html").decode()))
    assert (
        "Published and here A paper; FID 2.2 on GPUs. This run is not as published: sample.steps is 4, published"
        in text
    )
    assert "fid 2.1 2.5 +0.4 sfid 4 – not scored" in text and "9.9 " not in text.split("Published and here")[1][:400]


def test_pictures_are_files_of_their_own(reported: Artifact) -> None:
    for name in ("generated", "real", "reconstructed"):
        picture = Picture.open(io.BytesIO(reported.read(f"{name}.png")))
        assert picture.size == (10 * 66 - 2, 3 * 66 - 2), name
    assert Picture.open(io.BytesIO(reported.read("curves.png"))).mode == "RGBA"


def test_the_sum_leads_its_terms(tmp_path: Path) -> None:
    curves = {"kl": CURVES["kl"], "total": CURVES["total"], "velocity/texture": CURVES["kl"], "alignment": CURVES["kl"]}
    manifest = put(at(tmp_path), small_recipe(), "train_dit", [], facts={"curves": curves}).manifest
    assert list(_losses(manifest)) == ["total", "alignment", "kl"]


def test_a_plain_recipe_without_semantics_or_judge_is_reported(tmp_path: Path, local_ray: None) -> None:
    recipe = small_recipe(
        "train_semvae=null",
        "train_dit.clock={kind: synchronous}",
        "train_dit.objective.semantic_weight=1.0",
        "evaluate.classifier=null",
        "sample.guidance={method: none}",
    )
    page = perform(STAGE, prepared(tmp_path, recipe, judged=False).job).read("report.html").decode()
    assert "no guidance" in page and "Published and here" not in page
    assert (
        "Class consistency" not in page and "Consistency by class" not in page and "<th>train_semvae</th>" not in page
    )


# ------------------------------------------------------------------------------------------------------- reading


def test_images_are_picked_by_number_and_equal_those_read_in_order(tmp_path: Path) -> None:
    shards = put_shard(at(tmp_path), small_recipe())
    pieces = list(images(shards, "test", 32))
    labels, pixels = (np.concatenate(column) for column in zip(*pieces, strict=True))
    assert pixels.shape == (120, 32, 32, 3)
    assert np.array_equal(read_labels(shards, "test/", 120), labels)
    assert np.array_equal(read_labels(shards, "test/", 70), labels[:70])
    chosen = [119, 3, 60, 3, 59]
    assert np.array_equal(pick_images(shards.storage, shards.files("test/"), chosen, 32), pixels[chosen])
    limited = np.concatenate([part for _, part in images(shards, "test", 32, limit=77)])
    assert np.array_equal(limited, pixels[:77])
    with pytest.raises(ValueError, match="there are 120"):
        pick_images(shards.storage, shards.files("test/"), [120], 32)


def test_missing_and_foreign_images_are_refused(tmp_path: Path) -> None:
    shards = put_shard(at(tmp_path), small_recipe())
    with pytest.raises(UserError, match="no images in valid/"):
        list(images(shards, "valid", 32))
    labels = np.arange(10)
    sample = put_sample(at(tmp_path), small_recipe(), np.zeros((10, 32, 32, 3), np.uint8), labels)
    with pytest.raises(UserError, match=r"expected .64, 64, 3."):
        list(images(sample, "", 64))
    part = Path(sample.uri.removeprefix("file://")) / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(UserError, match=r"part-00001.parquet cannot be read"):
        list(images(sample, "", 32))


def test_columns_agree_between_pictures_of_different_sets() -> None:
    some, others = np.array([0, 1, 2, 4, 0, 1, 2, 4]), np.array([4, 2, 1, 3, 4, 2, 1, 3])
    common = np.intersect1d(some, others)
    assert [some[row].tolist() for row in shown_per_class(some, 10, 2, common)] == [[1, 2, 4]] * 2
    assert [others[row].tolist() for row in shown_per_class(others, 10, 2, common)] == [[1, 2, 4]] * 2
