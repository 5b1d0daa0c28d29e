"""The published recipes build the published networks."""

from __future__ import annotations

import pytest
import torch

from configs import UserError, load_recipe
from tasks.networks import (
    build_autoencoder,
    build_clock,
    build_dit,
    build_semantic_vae,
    channel_groups,
    check_foundation,
)

# Millions, position table included (papers.md 1.4 and 2.4; SFD with its alignment head).
PUBLISHED = {
    "lightningdit_xl_64ep": 675.26,
    "lightningdit_xl_800ep": 675.26,
    "sfd_xl_80ep": 682.77,
    "sfd_xl_80ep_short": 682.77,
    "sfd_xl_800ep": 682.77,
    "sfd_xxl_80ep": 1037.19,
    "sfd_xxl_800ep": 1037.19,
    "sfd_autoguide_b": 137.63,
}


def millions(module: torch.nn.Module) -> float:
    tensors = {name: value for name, value in module.state_dict().items() if "feat_rope" not in name}
    return sum(value.numel() for value in tensors.values()) / 1e6


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_recipes_build_the_published_networks(name: str, published: float) -> None:
    recipe = load_recipe(name)
    with torch.device("meta"):
        network = build_dit(recipe, recipe.train_dit.model)
        tokenizer = build_autoencoder(recipe.train_vavae.model)
    assert millions(network) == pytest.approx(published, abs=0.01)
    assert millions(tokenizer) == pytest.approx(69.84, abs=0.01)
    assert recipe.latent_size == 16


def test_sfd_recipes_have_the_published_semantic_vae() -> None:
    recipe = load_recipe("sfd_xl_80ep")
    assert recipe.train_semvae is not None and recipe.foundation is not None
    with torch.device("meta"):
        network = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
    assert millions(network) == pytest.approx(28.97 + 28.96, abs=0.02)
    assert channel_groups(recipe).sizes == (32, 16)
    assert build_clock(recipe).span == pytest.approx(1.3)


def test_a_foundation_that_only_timm_knows_is_asked_before_a_run() -> None:
    changes = ["foundation.name=resnet18", "foundation.weights=random", "foundation.layer=3"]
    fitting = load_recipe("demo_tiny", [*changes, "foundation.feature_dim=256", "foundation.input_size=64"])
    with pytest.raises(UserError, match=r"feature_dim is 7 but resnet18 \(layer 3\) gives 256: set"):
        check_foundation(load_recipe("demo_tiny", [*changes, "foundation.feature_dim=7"]))
    check_foundation(fitting)
    with pytest.raises(UserError, match=r"resnet18 gives features on a grid of 8 × 8.*input_size to 64"):
        check_foundation(
            load_recipe("demo_tiny", [*changes, "foundation.feature_dim=256", "foundation.input_size=128"])
        )
    with pytest.raises(UserError, match=r"foundation\.name nosuch: timm has no model"):
        check_foundation(load_recipe("demo_tiny", ["foundation.name=nosuch"]))
