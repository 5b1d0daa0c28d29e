"""A network that goes on with larger latents, and times that are shifted by their dimension."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError, load_recipe
from models.checkpoints import Checkpoint, load_into
from models.lightningdit import LightningDiT
from models.objectives import TimeDistribution
from models.solvers import time_grid
from tasks.networks import build_objective
from tests.helpers.builders import small_recipe

SMALL: dict[str, Any] = {"in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 3}


def network(side: int, **changes: Any) -> LightningDiT:
    torch.manual_seed(0)
    built = LightningDiT(input_size=side, **(SMALL | changes))
    for parameter in built.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return built.eval()


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (16, 2)])
def test_weights_of_a_smaller_grid_go_on_with_their_positions_spread(side: int, patch: int) -> None:
    """From 4 × 4 to 8 × 8 tokens: every angle is that of a quarter of the way between the old tokens."""
    small = network(4 * patch, patch_size=patch)
    large = network(side, patch_size=patch, positions_of=4)
    fresh = {name: value.clone() for name, value in large.state_dict().items()}
    load_into(large, Checkpoint("lightningdit", dict(small.state_dict())), "small")
    for name, value in large.state_dict().items():
        own = name == "pos_embed" or name.startswith("feat_rope.")
        assert torch.equal(value, fresh[name] if own else small.state_dict()[name]), name
    assert large.feat_rope is not None
    angles = torch.arange(8, dtype=torch.float64) * 0.5 - 0.25
    width = SMALL["hidden_size"] // SMALL["num_heads"]
    rates = 10000.0 ** -(torch.arange(0, width // 2, 2, dtype=torch.float64) / (width // 2))
    rows = large.feat_rope.freqs_cos.view(8, 8, width)[:, 0, : width // 2 : 2]
    torch.testing.assert_close(rows.double(), (angles[:, None] * rates).cos(), rtol=0, atol=1e-6)
    columns = large.pos_embed.view(8, 8, -1)[0, :, : SMALL["hidden_size"] // 4]
    omega = 10000.0 ** -(torch.arange(6, dtype=torch.float64) / 6)
    torch.testing.assert_close(columns.double(), (angles[:, None] * omega).sin(), rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_enlarged_latent_meets_nearly_the_same_network() -> None:
    """Of every cell four times the same: the velocity is close to the small one's, as it is not without resizing."""
    small = network(4, hidden_size=48)
    latents, times, labels = torch.randn(2, 4, 4, 4), torch.full((2,), 0.5), torch.tensor([0, 1])
    expected = small(latents, times, labels).repeat_interleave(2, 2).repeat_interleave(2, 3)
    errors = []
    for positions_of in (4, None):
        large = network(8, hidden_size=48, positions_of=positions_of)
        large.load_state_dict({**small.state_dict(), **_tables(large)})
        found = large(latents.repeat_interleave(2, 2).repeat_interleave(2, 3), times, labels)
        errors.append(float((found - expected).abs().mean() / expected.abs().mean()))
    assert errors[0] < 0.25 * errors[1] and errors[0] < 0.1, errors


def _tables(model: LightningDiT) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith(("pos_embed", "feat_rope."))}


def test_weights_of_a_smaller_grid_are_refused_unless_it_is_said() -> None:
    small = Checkpoint("lightningdit", dict(network(4).state_dict()))
    with pytest.raises(ValueError, match=r"or, for latents of another size, set positions_of: 4"):
        load_into(network(8), small, "small")
    with pytest.raises(ValueError, match="does not fit") as refusal:
        load_into(network(8, hidden_size=32, positions_of=4), small, "small")
    assert "positions_of" not in str(refusal.value)


def test_a_cascade_has_positions_of_its_own() -> None:
    with pytest.raises(
        UserError, match=r"train_dit.model.positions_of is 2 but train_dit.cascade has sides of its own"
    ):
        load_recipe("lowdiff_tiny", ["train_dit.model.positions_of=2"])


def test_times_are_shifted_by_the_dimension() -> None:
    """As Esser et al. 2024 and RAE: the share of noise u becomes α u / (1 + (α − 1) u), α² the ratio of dimensions."""
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    alpha = 3.0
    noise = alpha * u / (1 + (alpha - 1) * u)
    torch.testing.assert_close(TimeDistribution("uniform", shift=1 / alpha)(1 - u), 1 - noise)
    plain, bent = TimeDistribution(), TimeDistribution(shift=1 / alpha)
    assert torch.equal(TimeDistribution(shift=1.0)(u), plain(u)) and bool((bent(u) < plain(u)).all())


def test_recipes_shift_training_and_sampling_alike() -> None:
    base = "train_semvae=null", "train_dit.clock={kind: synchronous}", "sample.guidance={method: none}"
    more = "train_dit.objective.semantic_weight=1.0", "train_dit.objective.shift_base=8", "sample.shift_base=8"
    recipe = small_recipe(*base, *more)
    dimension = recipe.latent_channels * recipe.latent_size**2
    shift = recipe.time_shift(recipe.sample.shift_base, recipe.sample.shift)
    assert shift == pytest.approx(math.sqrt(8 / dimension)) and shift < 1
    objective: Any = build_objective(recipe)
    assert objective.times.shift == shift
    assert float(time_grid(4, shift=shift)[2]) == pytest.approx(shift * 0.5 / (1 - (1 - shift) * 0.5))
    with pytest.raises(UserError, match=r"sample.shift_base 8 shifts steps by the latents' dimension, beside solver"):
        small_recipe(*base, *more, "sample.shift=0.3")


@pytest.mark.parametrize("name", ["lightningdit_xl_512", "sfd_xl_512"])
def test_recipes_at_512_are_those_at_256_on_larger_latents(name: str, tmp_path: Path) -> None:
    large, small = load_recipe(name), load_recipe(f"{name.removesuffix('_512')}_800ep")
    assert (small.latent_size, large.latent_size) == (16, 32)
    assert large.time_shift(large.sample.shift_base, 0.0) == 0.5
    assert large.train_dit.model.model_copy(update={"positions_of": None}) == small.train_dit.model
    assert small.published is not None and small.published.released is not None
    assert large.train_dit.pretrained == small.published.released.weights
    assert "imagenet/512/" in (large.evaluate.reference or "")
