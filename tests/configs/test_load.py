"""Recipes: what is accepted, and that every refusal names the field, the value and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError, load_recipe, recipe_names
from configs.load import merge

PUBLISHED = [
    "lightningdit_xl_64ep",
    "lightningdit_xl_800ep",
    "sfd_xl_80ep",
    "sfd_xl_800ep",
    "sfd_xxl_80ep",
    "sfd_xxl_800ep",
    "sfd_autoguide_b",
]


def test_every_recipe_is_valid() -> None:
    assert set(PUBLISHED) <= set(recipe_names())
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_a_recipe_extends_another() -> None:
    short, long = load_recipe("sfd_xl_80ep"), load_recipe("sfd_xl_800ep")
    assert long.train_dit.images == 10 * short.train_dit.images
    assert long.train_dit.model == short.train_dit.model
    assert long.sample.guidance.weights == short.sample.guidance.weights  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train_dit.imagse=3", ["train_dit.imagse", "no such field", "did you mean images"]),
        ("bogus.field=1", ["bogus", "no such field"]),
        ("train_dit.images=many", ["train_dit.images", "integer", "'many'"]),
        ("train_dit.learning_rate=0", ["train_dit.learning_rate", "greater than 0"]),
        ("image.size=30", ["image.size 30", "multiple of 8", "24"]),
        ("train_semvae=null", ["semantic_first", "train_semvae", "synchronous"]),
        ("foundation=null", ["foundation"]),
        ("sample.images=13", ["sample.images 13", "10"]),
        ("train_dit.model.patch_size=3", ["train_dit.model.patch_size 3", "latent side 4"]),
        ("train_dit.model.hidden_size=100", ["hidden_size 100", "6 heads"]),
        ("train_dit.batch=33", ["train_dit.batch 33", "multiple of 2"]),
        ("encode.align_features=false", ["encode.align_features", "true"]),
        ("sample.guidance.scale=0.5", ["sample.guidance", "scale", "0.5"]),
        ("sample.guidance.channels=13", ["sample.guidance.channels", "13", "12 channels"]),
        ("data.source.kind=fodler", ["data.source", "fodler", "folder"]),
        ("train_vavae.model.norm_groups=7", ["norm_groups 7", "width 8"]),
        ("image.flips=1", ["image.flips", "boolean"]),
        ("train_dit.images", ["--set", "section.field=value"]),
    ],
)
def test_impossible_recipes_are_refused(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe("demo", [override])
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_overrides_change_values_and_kinds() -> None:
    recipe = load_recipe(
        "demo", ["train_dit.images=50000", "train_dit.learning_rate=2e-4", "sample.guidance.method=none"]
    )
    assert recipe.train_dit.images == 50_000
    assert recipe.train_dit.learning_rate == 2e-4
    assert recipe.sample.guidance.method == "none"


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean demo"):
        load_recipe("dmeo")


def test_a_recipe_file_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: demo\ndata: {source: {kind: folder, path: my images}, classes: 3}\nsample: {images: 30}\n"
    )
    recipe = load_recipe(str(mine))
    assert recipe.name == "mine"
    assert recipe.data.source.path == "my images"
    assert recipe.data.classes == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: loop.yaml", "extends itself"),
        ("- a list", "expected sections"),
        ("data: {a: 1, a: 2}", "given twice"),
        ("data: [", "not YAML"),
    ],
)
def test_broken_recipe_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_recipe("loop.yaml")


def test_merging_replaces_a_section_of_another_kind() -> None:
    base = {"guidance": {"method": "classifier_free", "scale": 2.0}, "kept": 1}
    assert merge(base, {"guidance": {"method": "none"}}) == {"guidance": {"method": "none"}, "kept": 1}
    assert merge(base, {"guidance": {"scale": 3.0}})["guidance"] == {"method": "classifier_free", "scale": 3.0}
