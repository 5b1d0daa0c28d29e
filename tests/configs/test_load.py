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
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.data.revision is None, "a name for what a source holds is its owner's to give"


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
        ("train_dit.model.hidden_size=126", ["hidden_size 126", "4 heads"]),
        ("train_dit.batch=33", ["train_dit.batch 33", "multiple of 2"]),
        ("encode.align_features=false", ["encode.align_features", "true"]),
        ("sample.guidance.scale=0.5", ["sample.guidance", "scale", "0.5"]),
        ("sample.guidance.channels=21", ["sample.guidance.channels", "21", "20 channels"]),
        ("data.source.kind=fodler", ["data.source", "fodler", "folder"]),
        ("train_vavae.model.norm_groups=7", ["norm_groups 7", "width 16"]),
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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train_dit.cascade.sides=[4, 2]", ["sides [4, 2]", "coarsest first"]),
        ("train_dit.cascade.sides=[1, 3, 4]", ["names 3", "halvings", "4, 2, 1"]),
        ("train_dit.cascade.sides=[1, 2]", ["ends at 2", "latents' side 4"]),
        ("train_dit.cascade.probabilities=[0.5, 0.4]", ["probabilities", "0.9", "make it 1"]),
        ("train_dit.cascade.weights=[1.0]", ["weights has 1 entries for 2 sides"]),
        ("train_dit.cascade=null", ["sample.stages", "train_dit.cascade is not"]),
        ("sample.stages=[{side: 2}]", ["goes through [2]", "[2, 4]"]),
        ("sample.stages=[{side: 1}, {side: 4}]", ["goes through [1, 4]", "[2, 4]"]),
        ("train_dit.model.patch_size=4", ["train_dit.model.patch_size 4", "2, one of train_dit.cascade.sides"]),
        (
            "sample.stages=[{side: 2}, {side: 4, guidance: {method: classifier_free, scale: 2.0, channels: 13}}]",
            ["sample.stages.1.guidance.channels", "13", "12 channels"],
        ),
    ],
)
def test_impossible_cascades_are_refused(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe("lowdiff_tiny", [override])
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_side_that_begins_by_itself_must_be_trained_to() -> None:
    stages, dropout = "sample.stages=[{side: 4, steps: 9}]", "train_dit.cascade.condition_dropout"
    recipe = load_recipe("lowdiff_tiny", [stages])
    assert [(stage.side, recipe.sample.at(stage).steps) for stage in recipe.sampled_resolutions] == [(4, 9)]
    with pytest.raises(UserError, match=r"condition_dropout is 0"):
        load_recipe("lowdiff_tiny", [stages, f"{dropout}=0.0"])


def test_recipes_without_a_cascade_are_what_they_were() -> None:
    """Their fingerprints must not change because another system has fields of its own."""
    recipe = load_recipe("demo")
    assert "cascade" not in recipe.section("train_dit") and "stages" not in recipe.section("sample")
    assert [(stage.side, recipe.sample.at(stage)) for stage in recipe.sampled_resolutions] == [(4, recipe.sample)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train_vavae={images: 640, model: {identity: false}}", ["train_dit.model.kind is unet", "identity"]),
        ("train_vavae.model.z_channels=4", ["z_channels is 4", "3"]),
        ("sample.solver=dopri5", ["dopri5", "heun, euler"]),
        ("sample.shift=0.3", ["shift 0.3", "without shift"]),
        ("train_dit.cascade=null", ["train_dit.cascade", "sides"]),
        ("train_dit.clock={kind: semantic_first, delta: 0.3}", ["train_dit.clock"]),
        ("train_dit.model.chanels=8", ["train_dit.model", "chanels", "no such field"]),
    ],
)
def test_impossible_pixel_recipes_are_refused(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe("lowdiff_pixels_tiny", [override, *(["sample.stages=[]"] if "cascade" in override else [])])
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_transformer_needs_latents() -> None:
    with pytest.raises(UserError, match=r"train_dit\.model\.kind is lightningdit"):
        load_recipe("lightningdit_xl_64ep", ["train_vavae.model={identity: true, z_channels: 3}"])


def test_networks_used_as_they_are_need_no_batch_and_no_rate() -> None:
    unneeded = "batch: null, learning_rate: null"
    given = load_recipe("demo", [f"train_vavae={{images: 0, pretrained: mine.safetensors, {unneeded}}}"])
    assert given.train_vavae.batch is None and given.train_vavae.learning_rate is None
    assert load_recipe("sfd_xl_80ep").train_vavae.batch is None
    with pytest.raises(UserError, match=r"train_vavae: images is 40000 but batch and learning_rate are not set"):
        load_recipe("demo", ["train_vavae.batch=null", "train_vavae.learning_rate=null"])
    with pytest.raises(UserError, match=r"train_dit: images is 64000 but learning_rate is not set"):
        load_recipe("demo", ["train_dit.learning_rate=null"])


def test_a_base_is_extended_and_neither_listed_nor_run(tmp_path: Path) -> None:
    assert "imagenet256" not in recipe_names()
    with pytest.raises(UserError, match="imagenet256 is a base"):
        load_recipe("imagenet256")
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: imagenet256\ntrain_vavae: {images: 0, pretrained: mine.safetensors}\n")
    recipe = load_recipe(str(mine))
    assert recipe.data.classes == 1000 and recipe.image.size == 256
    with pytest.raises(UserError, match="no recipe 'imagenet'"):
        load_recipe("imagenet")


def test_sections_that_no_stage_reads_may_be_left_out(tmp_path: Path) -> None:
    tokenizer = load_recipe("vavae_f16d32")
    assert tokenizer.lacks("train_dit") and tokenizer.lacks("sample") and not tokenizer.lacks("evaluate")
    with pytest.raises(UserError, match="recipe vavae_f16d32 has no section sample, which stage sample reads"):
        tokenizer.section("sample")
    assert not any(load_recipe("demo").lacks(name) for name in ("train_dit", "sample", "foundation"))
    only_training = load_recipe("lowdiff_tiny", ["sample=null", "evaluate=null"])
    assert only_training.sides == (2, 4) and only_training.lacks("evaluate")
    with pytest.raises(UserError, match=r"train_dit\.cascade\.sides ends at 2"):  # its own rules hold
        load_recipe("lowdiff_tiny", ["sample=null", "train_dit.cascade.sides=[1, 2]"])


def test_large_numbers_are_written_with_underscores(tmp_path: Path) -> None:
    assert load_recipe("demo", ["train_dit.images=102_400_000"]).train_dit.images == 102_400_000
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: demo\ntrain_dit: {images: 1_024_000, learning_rate: 1_0.5e-4}\n")
    recipe = load_recipe(str(mine))
    assert (recipe.train_dit.images, recipe.train_dit.learning_rate) == (1_024_000, 10.5e-4)


@pytest.mark.parametrize(
    "section", ["shard", "train_vavae", "train_semvae", "encode", "train_dit", "sample", "evaluate"]
)
def test_seeds_outside_their_range_are_refused(section: str) -> None:
    for seed in (-1, 2**63, 2**63 + 5):
        with pytest.raises(UserError, match=rf"{section}\.seed.*{seed}"):
            load_recipe("demo_tiny", [f"{section}.seed={seed}"])
    assert getattr(load_recipe("demo_tiny", [f"{section}.seed={2**63 - 1}"]), section).seed == 2**63 - 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["sample.guidance.interval_start=0.6", "sample.guidance.interval_end=0.2"],
            ["interval_start 0.6"],
        ),
        (["sample.guidance.groups=semantics"], ["sample.guidance", "groups", "'semantics'", "texture"]),
        (
            ["sample.guidance.groups=semantic", "sample.guidance.channels=3"],
            ["groups is semantic", "come after 16 of texture", "first 3"],
        ),
        (
            ["sample.ema_sigma=0.1", "train_dit.images=0", "train_dit.pretrained=w"],
            ["ema_sigma is 0.1", "images is 0", "leave ema_sigma out"],
        ),
        (
            [
                "train_semvae=null",
                "train_dit.clock.kind=synchronous",
                "train_dit.objective.semantic_weight=1.0",
                "sample.guidance.groups=texture",
            ],
            ["sample.guidance.groups is texture", "use both"],
        ),
        (
            [
                "sample.guidance={method: autoguidance, scale: 1.5, weights: w, model: {size: S}, groups: texture, "
                "semantic_scale: 2.0}"
            ],
            ["semantic_scale is 2", "groups is texture"],
        ),
    ],
)
def test_impossible_guidance_and_averages_are_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        load_recipe("demo", overrides)
    for word in words:
        assert word in str(refused.value)
