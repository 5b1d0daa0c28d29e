"""Tokenizer losses in closed form; the golden cases compare the alignment terms with the published numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.semantic_vae import SemanticVAE
from models.tokenizer_losses import (
    TrainableSemanticVAE,
    TrainableTokenizer,
    adaptive_weight,
    hinge_discriminator,
    hinge_generator,
    marginal_cosine,
    marginal_distance_matrix,
    reconstruction_error,
    semantic_terms,
)
from tests.models.test_autoencoders import small

IMAGES = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
NOISE = torch.ones(2, 3, 4, 4)
FEATURES = torch.sin(torch.arange(2 * 5 * 16.0)).view(2, 5, 4, 4)


def test_margins_forgive() -> None:
    z, f = torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)
    assert marginal_cosine(f, f, 0.0).item() == pytest.approx(0.0, abs=1e-6)
    assert marginal_cosine(-f, f, 0.5).item() == pytest.approx(1.5, abs=1e-5)
    assert marginal_distance_matrix(3 * f, f, 0.0).item() == pytest.approx(0.0, abs=1e-5)
    assert marginal_distance_matrix(z, f, 2.0).item() == 0.0
    # The distance matrix compares relations, not directions, so widths may differ.
    assert marginal_distance_matrix(torch.randn(2, 9, 3, 3), f, 0.0) > 0
    with pytest.raises(ValueError, match="one grid"):
        marginal_cosine(z, torch.randn(2, 6, 4, 4))


def test_reconstruction_is_a_sum_over_pixels() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert reconstruction_error(x, x + 0.5, "l1").tolist() == [24.0, 24.0]
    assert reconstruction_error(x, x + 0.5, "l2").tolist() == [12.0, 12.0]


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    main, other = torch.tensor([6.0, 8.0]), torch.tensor([2.0, 2.0])
    found = adaptive_weight(main, other, maximum=1e4)
    assert found.item() == pytest.approx(10 / (2 * math.sqrt(2) + 1e-4), rel=1e-5)
    assert adaptive_weight(main, other, maximum=1.5).item() == 1.5


def test_hinge_losses() -> None:
    assert hinge_discriminator(torch.tensor([2.0]), torch.tensor([-2.0])).item() == 0.0
    assert hinge_discriminator(torch.tensor([0.0]), torch.tensor([0.0])).item() == 1.0
    assert hinge_generator(torch.tensor([1.0, 3.0])).item() == -2.0


def tokenizer(**options: object) -> TrainableTokenizer:
    torch.manual_seed(0)
    return TrainableTokenizer(small(), **options)  # type: ignore[arg-type]


def _squares(x: Tensor, recon: Tensor) -> Tensor:
    return (x - recon).square().mean(dim=(1, 2, 3))


def test_plain_tokenizer_total() -> None:
    found = tokenizer(kl_weight=0.5)(IMAGES, NOISE)
    torch.testing.assert_close(found["total"].detach(), found["reconstruction"] + 0.5 * found["kl"])
    assert found["image"].shape == IMAGES.shape and found["latent"].shape == NOISE.shape
    assert [name for name, value in found.items() if value.requires_grad] == ["total"]


def test_alignment_is_balanced_against_the_reconstruction() -> None:
    module = tokenizer(feature_dim=5, align_weight=0.1, cosine_margin=0.0, distance_margin=0.0)
    assert module.linear_proj is not None and module.linear_proj.weight.shape == (5, 3, 1, 1)
    found = module(IMAGES, NOISE, FEATURES)
    # The two weighted gradients at the encoder's last weight stand in the ratio align_weight.
    recon, _, z = module.model(IMAGES, NOISE)
    projected = module.linear_proj(z)
    alignment = marginal_cosine(projected, FEATURES, 0.0) + marginal_distance_matrix(projected, FEATURES, 0.0)
    (fidelity,) = torch.autograd.grad(
        reconstruction_error(IMAGES, recon).mean(), module.model.last_encoder_weight, retain_graph=True
    )
    (pull,) = torch.autograd.grad(alignment, module.model.last_encoder_weight)
    assert (found["align_scale"] * pull.norm() / fidelity.norm()).item() == pytest.approx(0.1, rel=1e-2)
    expected = found["reconstruction"] + 1e-6 * found["kl"] + found["align_scale"] * alignment.detach()
    torch.testing.assert_close(found["total"].detach(), expected)
    found["total"].backward()
    assert all(p.grad is not None for p in module.parameters())


def test_one_decoder_backward_gives_the_gradients_of_two() -> None:
    found = []
    for once in (True, False):
        module = tokenizer(feature_dim=5, align_weight=0.1, one_decoder_backward=once, perceptual=_squares)
        terms = module(IMAGES, NOISE, FEATURES)
        (2 * terms["total"]).backward()  # as a loss scaler does
        found.append({name: p.grad for name, p in module.named_parameters()} | {"total": terms["total"].detach()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_balance_is_of_all_workers() -> None:
    """Two halves of a batch with averaged gradients have the weight of the whole batch."""
    options = {"feature_dim": 5, "cosine_margin": 0.0, "distance_margin": 0.0}
    whole = tokenizer(**options)(IMAGES, NOISE, FEATURES)["align_scale"]
    seen: list[Tensor] = []
    tokenizer(**options, average=lambda g: seen.append(g) or g)(IMAGES[:1], NOISE[:1], FEATURES[:1])
    first, seen = seen, []
    means = iter(first)
    half = tokenizer(**options, average=lambda g: (next(means) + g) / 2)(IMAGES[1:], NOISE[1:], FEATURES[1:])
    torch.testing.assert_close(half["align_scale"], whole, rtol=1e-4, atol=0.0)


def test_fixed_weight_and_missing_features() -> None:
    module = tokenizer(feature_dim=5, align_weight=0.25, adaptive=False)
    assert module(IMAGES, NOISE, FEATURES)["align_scale"].item() == 0.25
    with pytest.raises(ValueError, match="features"):
        module(IMAGES, NOISE)
    module = tokenizer(feature_dim=5, align_weight=0.25).eval()
    with torch.no_grad():
        assert module(IMAGES, NOISE, FEATURES)["align_scale"].item() == 0.25


def test_perceptual_and_adversarial_terms() -> None:
    found = tokenizer(perceptual=_squares, adversarial_weight=0.5)(
        IMAGES, NOISE, discriminator=lambda image: image.mean(dim=(1, 2, 3))
    )
    parts = found["reconstruction"] + found["perceptual"] + 1e-6 * found["kl"]
    torch.testing.assert_close(found["total"].detach(), parts + found["adversarial_scale"] * found["adversarial"])
    assert found["adversarial_scale"] > 0


def test_semantic_terms_and_both_axes() -> None:
    features, kl = torch.randn(2, 3, 2, 2), torch.tensor([4.0, 6.0])
    per_token = features * torch.rand(2, 1, 2, 2).add(0.5)  # each token scaled: feature vectors keep direction
    terms = semantic_terms(features, per_token, kl, kl_weight=0.1)
    assert terms.terms["cosine"].item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(terms.total, (features - per_token).square().mean() + 0.1 * 5.0)
    assert semantic_terms(features, per_token, kl, cosine_axis="token").terms["cosine"] > 1e-3
    per_feature = features * torch.rand(1, 3, 1, 1).add(0.5)
    assert semantic_terms(features, per_feature, kl, cosine_axis="token").terms["cosine"].item() == pytest.approx(
        0.0, abs=1e-6
    )


def test_semantic_vae_learns() -> None:
    torch.manual_seed(0)
    module = TrainableSemanticVAE(SemanticVAE(feature_dim=5, width=16, depth=1, num_heads=2, bottleneck=3))
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        found = module(FEATURES, torch.zeros(2, 3, 4, 4))
        assert found.keys() == {"total", "mse", "cosine", "kl"}
        optimizer.zero_grad()
        found["total"].backward()
        optimizer.step()
        losses.append(found["total"].item())
    assert losses[-1] < 0.5 * losses[0]
