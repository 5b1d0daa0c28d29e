"""The cascade on artifacts: exact statistics per resolution, batches of one resolution, samples through all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from configs import Recipe, UserError, load_recipe
from infra.artifacts import Artifact
from models.guidance import Velocity
from tasks.data.statistics import ChannelSums, LatentStatistics, statistics_hash
from tasks.data.tensors import WRITE_OPTIONS, latent_table
from tasks.encode import standards
from tasks.loading.loader import Batch
from tasks.networks import build_dit, channel_groups
from tasks.plan import networks
from tasks.sample import STAGE
from tasks.sampling.integrator import build_guidance
from tasks.sampling.sampler import Sampler
from tasks.train_dit import STAGE as TRAIN
from tasks.train_dit import Diffusion
from tasks.training.launch import train
from tasks.training.resolutions import Resolutions
from tasks.training.trainee import HELD_OUT_NUMBERS
from tests.helpers.builders import at, context, put, put_networks
from tests.tasks.test_sample import INPUTS

SMALL = ("train_dit.model.depth=2", "train_dit.batch=16", "sample.images=40")
ROWS = 48


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("lowdiff_tiny", [*SMALL, *overrides])


def put_latents(root: str, recipe: Recipe) -> dict[str, np.ndarray]:
    """An `encode` artifact of random latents with the statistics that the stage stores; gives its columns."""
    random = np.random.default_rng(0)
    side, names = recipe.latent_size, ("z", "s")[: len(recipe.channel_groups)]
    shapes = {name: (count, side, side) for name, count in zip(names, recipe.channel_groups.values(), strict=True)}
    if recipe.foundation is not None:
        shapes["f"] = (recipe.foundation.feature_dim, side, side)
    columns = {name: random.uniform(-0.5, 1.0, (ROWS, *shape)).astype(np.float16) for name, shape in shapes.items()}
    table = latent_table([str(row) for row in range(ROWS)], np.arange(ROWS) % 10, columns)
    entry = Artifact(root, "encode", "encode").storage.write_table("train/part-0.parquet", table, 16, **WRITE_OPTIONS)
    statistics = {name: standards(ChannelSums.of(columns[name]), recipe) for name in names}
    averages: dict[str, Any] = {}
    for coarse in recipe.sides[:-1]:
        own = {name: standards(ChannelSums.of_averages(columns[name])[coarse], recipe) for name in names}
        averages[str(coarse)] = {"statistics": own, "statistics_hash": statistics_hash(own)}
    facts = {
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
        "averages": averages,
        "shapes": shapes,
        "rows_per_group": 16,
    }
    put(root, recipe, "encode", [entry], facts=facts)
    return columns


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_averages_are_exact() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, (300, 2, 8, 8)).astype(np.float16)
    found = ChannelSums.of_averages(values)
    assert sorted(found) == [1, 2, 4]
    pooled = values.astype(np.float64).reshape(300, 2, 2, 4, 2, 4).mean(axis=(3, 5))
    moments = found[2].mean_and_std()
    np.testing.assert_allclose(moments["mean"], pooled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(moments["std"], pooled.std(axis=(0, 2, 3)), rtol=1e-12)
    assert moments["count"] == 300 * 4
    assert sorted(ChannelSums.of_averages(values[..., :6, :6])) == [3], "sides are halved while they are even"


def test_statistics_of_averages_that_are_missing_or_changed_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of()
    put_latents(at(tmp_path), recipe)
    facts = Artifact(at(tmp_path), "encode", "encode").manifest.facts
    assert LatentStatistics.of_averages(facts, 2).hash == facts["averages"]["2"]["statistics_hash"]
    with pytest.raises(UserError, match="no statistics of averages of side 3"):
        LatentStatistics.of_averages(facts, 3)
    changed = {"averages": {"2": {**facts["averages"]["2"], "statistics_hash": "0" * 16}}}
    with pytest.raises(UserError, match="were changed"):
        LatentStatistics.of_averages(changed, 2)


# -------------------------------------------------------------------------------------------------------- batches


def resolutions(folder: Path, *overrides: str) -> tuple[Resolutions, dict[str, np.ndarray]]:
    recipe = recipe_of(*overrides)
    columns = put_latents(at(folder), recipe)
    assert recipe.train_dit.cascade is not None
    return Resolutions(recipe.train_dit.cascade, Artifact(at(folder), "encode", "encode"), 0), columns


def test_the_resolution_of_a_batch_is_drawn_from_seed_and_cursor(tmp_path: Path) -> None:
    ours, _ = resolutions(tmp_path, "train_dit.cascade.probabilities=[0.25, 0.75]")
    again, _ = resolutions(tmp_path, "train_dit.cascade.probabilities=[0.25, 0.75]")
    cursors = range(16, 16 * 2_001, 16)
    drawn = [ours.side(cursor) for cursor in cursors]
    assert [again.side(cursor) for cursor in reversed(cursors)] == drawn[::-1]
    assert 0.21 < drawn.count(2) / len(drawn) < 0.29
    always, _ = resolutions(tmp_path, "train_dit.cascade.sides=[4]", "sample.stages=[]")
    assert {always.side(cursor) for cursor in cursors} == {4}


def test_targets_of_every_resolution_are_standardised(tmp_path: Path) -> None:
    ours, columns = resolutions(tmp_path)
    stored = torch.from_numpy(np.concatenate([columns["z"], columns["s"]], axis=1))
    for side in (2, 4):
        target = ours.target(stored, side)
        assert target.shape == (ROWS, 12, side, side) and target.dtype == torch.float32
        torch.testing.assert_close(target.mean(dim=(0, 2, 3)), torch.zeros(12), atol=1e-4, rtol=0)
        torch.testing.assert_close(target.std(dim=(0, 2, 3), correction=0), torch.ones(12), atol=1e-4, rtol=0)


def test_conditions_are_dropped_and_corrupted_image_by_image(tmp_path: Path) -> None:
    ours, columns = resolutions(tmp_path, "train_dit.cascade.condition_dropout=0.5")
    stored = torch.from_numpy(np.concatenate([columns["z"], columns["s"]], axis=1))
    positions = np.arange(100, 100 + ROWS)
    condition, level = ours.condition(stored, positions, 4)
    dropped = level == 1.0
    assert 10 < int(dropped.sum()) < 38
    assert not condition[dropped].any() and condition[~dropped].flatten(1).any(dim=1).all()
    assert float(level[~dropped].max()) < 0.5 and len(level.unique()) > 20
    rows = slice(20, 30)  # another worker's share
    share, its_level = ours.condition(stored[rows], positions[rows], 4)
    assert torch.equal(share, condition[rows]) and torch.equal(its_level, level[rows])
    first, nothing = ours.condition(stored, positions, 2)
    assert first.shape == (ROWS, 12, 2, 2) and not first.any() and bool((nothing == 1.0).all())


def test_workers_share_the_resolution_and_the_stream_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Every global batch, cut over any number of workers and restarted anywhere, is the same in every bit."""
    recipe = recipe_of("train_dit.cascade.weights=[0.5, 1.0]")
    put_latents(at(tmp_path), recipe)
    job = context(at(tmp_path), recipe, TRAIN, "encode")

    def batches(count: int, cursor: int, rank: int, world: int) -> list[dict[str, Any]]:
        trainee = Diffusion(job)
        stream = trainee.loader.stream(cursor, rank, world)
        try:
            return [trainee.inputs(next(stream), torch.device("cpu")) for _ in range(count)]
        finally:
            stream.close()  # type: ignore[attr-defined]

    whole = batches(12, 0, 0, 1)
    assert {given["x1_BCHW"].shape[-1] for given in whole} == {2, 4}
    for given in whole:
        side = given["x1_BCHW"].shape[-1]
        assert given["weight"] == (0.5 if side == 2 else 1.0)
        assert {tuple(given[name].shape) for name in ("x1_BCHW", "noise_BCHW", "condition_BCHW")} == {
            (16, 12, side, side)
        }
        assert given["align_target_BChw"].shape == (16, 112, side, side)
    halves = zip(batches(12, 0, 0, 2), batches(12, 0, 1, 2), strict=True)
    for given, (left, right) in zip(whole, halves, strict=True):
        for name in ("x1_BCHW", "noise_BCHW", "condition_BCHW", "level_B", "u_B", "y_B", "align_target_BChw"):
            assert torch.equal(torch.cat([left[name], right[name]]), given[name]), name
    for given, again in zip(whole[5:], batches(7, 5 * 16, 0, 1), strict=True):
        assert torch.equal(given["x1_BCHW"], again["x1_BCHW"])
        assert torch.equal(given["condition_BCHW"], again["condition_BCHW"])


# ------------------------------------------------------------------------------------------------------- sampling


def sampler(folder: Path, *overrides: str) -> Sampler:
    recipe = recipe_of(*overrides)
    put_networks(at(folder), recipe)
    return Sampler.of(context(at(folder), recipe, STAGE, *INPUTS))


GUIDED = "sample.guidance={method: classifier_free, scale: 2.0}"


def test_images_of_a_cascade_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    ours = sampler(tmp_path)
    _, images = ours.images(np.arange(10))
    assert images.shape == (10, 32, 32, 3) and len({image.tobytes() for image in images}) == 10
    order = np.array([7, 3, 0])
    assert np.abs(ours.images(order)[1].astype(int) - images[order].astype(int)).max() <= 1


def test_every_setting_of_a_stage_counts(tmp_path: Path) -> None:
    def images(stages: str) -> bytes:
        return sampler(tmp_path, f"sample.stages={stages}").images(np.arange(2))[1].tobytes()

    coarse, fine = "{side: 2, steps: 3}", "{side: 4, steps: 2}"
    found = [
        images(f"[{coarse}, {fine}]"),
        images(f"[{fine}]"),
        images("[{side: 2, steps: 4}, " + fine + "]"),
        images("[{side: 2, steps: 3, guidance: {method: none}}, " + fine + "]"),
        images("[{side: 2, steps: 3, shift: 0.3}, " + fine + "]"),
        images("[{side: 2, steps: 3, solver: heun}, " + fine + "]"),
        images(f"[{coarse}, " + "{side: 4, steps: 2, augment: 0.4}]"),
    ]
    assert len(set(found)) == len(found)


def test_the_lower_result_reaches_the_finer_stage_and_semantics_lead_at_both(tmp_path: Path) -> None:
    """Another seed below changes what comes above, all else being equal."""
    ours = sampler(tmp_path)
    asked: list[tuple[tuple[int, ...], int]] = []

    def noise(shape: tuple[int, ...], draw: int, salt: int = 0) -> torch.Tensor:
        asked.append((shape, draw))
        generator = torch.Generator().manual_seed(draw % 1000 + salt * (shape[-1] == 2))
        return torch.randn(2, *shape, generator=generator)

    labels = torch.tensor([0, 1])
    one = ours.integrator(labels, noise)
    assert [shape for shape, _ in asked] == [(12, 2, 2), (12, 2, 2), (12, 4, 4)], "stage, its result's noise, stage"
    assert len({draw for _, draw in asked}) == 3
    other = ours.integrator(labels, lambda shape, draw: noise(shape, draw, salt=1))
    assert one.shape == (2, 12, 4, 4) and not torch.allclose(one, other)


def test_evaluations_are_counted_in_units_of_the_full_resolution(tmp_path: Path) -> None:
    from models.flops import forward_flops

    ours = sampler(tmp_path, GUIDED)
    ours.images(np.arange(2))
    ours.images(np.arange(2, 4))
    model = ours.integrator.model
    low = forward_flops(model, side=2) / forward_flops(model)
    found = ours.integrator.evaluations()
    assert found["evaluations"] == 2 * (3 + 2)
    assert found["effective_evaluations"] == pytest.approx(2 * (3 * low + 2))
    plain = sampler(tmp_path, "sample.stages=[{side: 4, steps: 5}]", "sample.guidance={method: none}")
    plain.images(np.arange(2))
    assert plain.integrator.evaluations() == {"effective_evaluations": 5.0, "evaluations": 5.0}


BY_A_WEAK_ONE = "{method: autoguidance, scale: 1.6, weights: weak.pt, model: {size: S}"


@pytest.mark.parametrize(
    ("fields", "semantics_from"),
    [
        ("groups: both", 2.0),
        ("groups: semantic, semantic_scale: 3.0", 3.0),
        ("groups: texture", 1.0),
        ("interval_start: 0.5", 2.0),
        ("interval_end: 0.4", 1.0),
    ],
)
def test_a_weak_network_guides_some_channels_for_some_of_the_time(fields: str, semantics_from: float) -> None:
    """Main velocity 1 and the guide's 0, so a guided channel moves by its scale."""
    recipe = load_recipe("demo_tiny", [f"sample.guidance={BY_A_WEAK_ONE}, {fields}}}", "sample.guidance.scale=2.0"])
    groups = channel_groups(recipe)

    def always(value: float) -> Velocity:
        return lambda x_BCHW, t_BG, y_B: torch.full_like(x_BCHW, value)

    guided = build_guidance(recipe.sample.guidance, groups, null_label=10, guide=always(0.0))(always(1.0))
    at = torch.tensor([[0.3, 0.6]])  # texture, semantics
    found = guided(torch.zeros(1, groups.channels, 2, 2), at, torch.zeros(1, dtype=torch.long))
    texture, semantics = (found[0, part].unique().tolist() for part in groups.slices)
    texture_guided = "texture" in fields or "both" in fields or "interval_end" in fields
    assert texture == [2.0 if texture_guided else 1.0] and semantics == [semantics_from]


def test_a_cascade_guides_a_cascade(tmp_path: Path) -> None:
    recipe = recipe_of()
    torch.manual_seed(3)
    weak = build_dit(recipe, recipe.train_dit.model)
    for parameter in weak.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file(weak.state_dict(), tmp_path / "weak.safetensors")
    model = recipe.train_dit.model.model_dump_json()
    guidance = f"{{method: autoguidance, scale: 2.0, weights: {tmp_path / 'weak.safetensors'}, model: {model}}}"
    ours = sampler(tmp_path, f"sample.guidance={guidance}")
    assert len({id(stage.weak) for stage in ours.integrator.stages}) == 1, "one network, loaded once"
    guided = ours.images(np.arange(2))[1]
    assert not np.array_equal(guided, sampler(tmp_path, "sample.guidance={method: none}").images(np.arange(2))[1])
    assert ours.integrator.evaluations()["evaluations"] == 2 * (3 + 2)


# --------------------------------------------------------------------------------------------------------- pixels


def pixel_sampler(folder: Path, *overrides: str) -> Sampler:
    recipe = load_recipe("lowdiff_pixels_tiny", ["sample.images=40", *overrides])
    put_networks(at(folder), recipe)
    return Sampler.of(context(at(folder), recipe, STAGE, *INPUTS))


def test_pixels_are_sampled_by_heun_through_both_resolutions(tmp_path: Path) -> None:
    ours = pixel_sampler(tmp_path)
    _, images = ours.images(np.arange(6))
    assert images.shape == (6, 16, 16, 3) and len({image.tobytes() for image in images}) == 6
    again = ours.images(np.array([4, 1]))[1]
    assert np.abs(again.astype(int) - images[[4, 1]].astype(int)).max() <= 1
    # Two evaluations for each of 3 and 2 steps but the last, each with its unconditional twin.
    assert ours.integrator.evaluations()["evaluations"] == 2 * (5 + 3)
    euler = pixel_sampler(tmp_path, "sample.solver=euler", "sample.guidance={method: none}")
    euler.images(np.arange(2))
    assert euler.integrator.evaluations()["evaluations"] == 3 + 2


def test_pixels_are_trained_on_as_they_are(tmp_path: Path) -> None:
    recipe = load_recipe("lowdiff_pixels_tiny")
    assert recipe.latent_size == 16 and recipe.channel_groups == {"texture": 3}
    values = torch.from_numpy(put_latents(at(tmp_path), recipe)["z"]).float()
    trainee = Diffusion(context(at(tmp_path), recipe, TRAIN, "encode"))
    assert trainee.resolutions is not None
    assert torch.equal(trainee.resolutions.target(values, 16), values)
    assert torch.equal(trainee.statistics.denormalise(values), values), "and come out as they are"
    torch.testing.assert_close(trainee.resolutions.target(values, 8)[0, 0, 0, 0], values[0, 0, :2, :2].mean())


def test_pixels_are_augmented_in_training_and_the_network_is_told(tmp_path: Path) -> None:
    recipe = load_recipe("lowdiff_pixels_tiny", ["train_dit.model.augment=0.5"])
    values = torch.from_numpy(put_latents(at(tmp_path), recipe)["z"])
    trainee = Diffusion(context(at(tmp_path), recipe, TRAIN, "encode"))
    assert trainee.resolutions is not None
    seen = next(images for images in range(32, 3200, 32) if trainee.resolutions.side(images) == 16)
    batch = Batch(seen, np.arange(8), [], np.zeros(8, np.int64), {"z": values[:8].numpy()})
    given = trainee.inputs(batch, torch.device("cpu"))
    told, again = given["augment_BA"], trainee.inputs(batch, torch.device("cpu"))
    assert torch.equal(again["x1_BCHW"], given["x1_BCHW"]) and torch.equal(again["augment_BA"], told)
    changed = (given["x1_BCHW"] != values[:8].float()).flatten(1).any(dim=1)
    assert torch.equal(changed, told.any(dim=1)) and 4 <= int(changed.sum()) <= 8
    assert trainee.module(**given)["total"].isfinite()
    unseen = replace(batch, positions=np.arange(8) + HELD_OUT_NUMBERS)
    assert "augment_BA" not in trainee.inputs(unseen, torch.device("cpu"))
    plain = load_recipe("lowdiff_pixels_tiny")
    assert Diffusion(context(at(tmp_path), plain, TRAIN, "encode")).augmentation is None


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["lowdiff_tiny", "lowdiff_pixels_tiny"])
def test_interrupted_and_resumed_is_the_same_in_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    small = ["train_dit.images=128", "train_dit.batch=16", "compute.train.checkpoint_every=32"]
    recipe = load_recipe(name, [*small, "compute.train.workers=1", "compute.train.engine=plain"])
    weights = []
    for folder, broken in (("whole", False), ("resumed", True)):
        root, calls = at(tmp_path / folder), []
        put_latents(root, recipe)
        job = context(root, recipe, TRAIN, "encode")
        if broken:
            real = Diffusion.inputs

            def failing(self: Diffusion, *given: Any, real: Any = real, calls: list[int] = calls) -> dict[str, Any]:
                calls.append(1)
                if len(calls) == 6:
                    raise RuntimeError("the power goes")
                return real(self, *given)

            with monkeypatch.context() as patch:
                patch.setattr(Diffusion, "inputs", failing)
                with pytest.raises(RuntimeError, match="power"):
                    train(job, recipe.train_dit, alone=True)
        outcome = train(job, recipe.train_dit, alone=True)
        assert outcome.facts["averages"]
        weights.append({entry.path: job.out.read_bytes(entry.path) for entry in outcome.files})
    assert weights[0] == weights[1] and {"model.safetensors", "ema.safetensors"} <= weights[0].keys()
    stored = load(weights[0]["model.safetensors"])
    assert not [key for key in stored if key.startswith("coarse_")], "tables are made anew, not stored"
    assert stored["resolution_embedder.weight"].shape[0] == 2


def test_a_routed_guide_costs_what_the_plan_says(tmp_path: Path) -> None:
    """Less than twice the passes of no guidance, and other images than classifier-free guidance makes."""
    routing = "train_dit.routing={first: 1, last: 2, drop: 0.5}"
    ours = sampler(tmp_path, routing, "sample.guidance={method: routed, scale: 2.0}", "sample.steps=3")
    routed = ours.images(np.arange(2))[1]
    recipe = ours.recipe
    model, sides = recipe.train_dit.model, [each.side for each in recipe.sampled_resolutions]
    passes = [networks.diffusion(recipe, model, side)[0].flops for side in sides]
    guides = [main - networks.routed_flops(recipe, model, side) for main, side in zip(passes, sides, strict=True)]
    assert all(guide < 0.8 * main for guide, main in zip(guides, passes, strict=True))
    found, steps = ours.integrator.evaluations(), [recipe.sample.at(each).steps for each in recipe.sampled_resolutions]
    cost = sum(n * (main + guide) for n, main, guide in zip(steps, passes, guides, strict=True))
    assert found["effective_evaluations"] == pytest.approx(cost / passes[-1])
    assert found["evaluations"] == 2 * sum(steps)
    plain = sampler(tmp_path, routing, GUIDED, "sample.steps=3").images(np.arange(2))[1]
    assert not np.array_equal(routed, plain)
