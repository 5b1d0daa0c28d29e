"""Tokenizer losses in closed form; the golden cases compare the alignment terms with the published numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.discriminator import PatchDiscriminator
from models.semantic_vae import SemanticVAE
from models.tokenizer_losses import (
    TokenizerWeights,
    TrainableSemanticVAE,
    TrainableTokenizer,
    adaptive_weight,
    disturbed,
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
NO_MARGINS = {"cosine_margin": 0.0, "distance_margin": 0.0}
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


def tokenizer(weights: dict[str, float] | None = None, **options: object) -> TrainableTokenizer:
    torch.manual_seed(0)
    return TrainableTokenizer(small(), weights=TokenizerWeights(**(weights or {})), **options)  # type: ignore[arg-type]


def _squares(x: Tensor, recon: Tensor) -> Tensor:
    return (x - recon).square().mean(dim=(1, 2, 3))


def test_plain_tokenizer_total() -> None:
    found = tokenizer({"kl": 0.5})(IMAGES, NOISE)
    torch.testing.assert_close(found["total"].detach(), found["reconstruction"] + 0.5 * found["kl"])
    assert found["image"].shape == IMAGES.shape and found["latent"].shape == NOISE.shape
    assert [name for name, value in found.items() if value.requires_grad] == ["total"]


def test_alignment_is_balanced_against_the_reconstruction() -> None:
    module = tokenizer(NO_MARGINS, feature_dim=5)
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
        module = tokenizer(feature_dim=5, one_decoder_backward=once, perceptual=_squares)
        terms = module(IMAGES, NOISE, FEATURES)
        (2 * terms["total"]).backward()  # as a loss scaler does
        found.append({name: p.grad for name, p in module.named_parameters()} | {"total": terms["total"].detach()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_balance_is_of_all_workers() -> None:
    """Two halves of a batch with averaged gradients have the weight of the whole batch."""
    options: dict[str, Any] = {"weights": NO_MARGINS, "feature_dim": 5}
    whole = tokenizer(**options)(IMAGES, NOISE, FEATURES)["align_scale"]
    seen: list[Tensor] = []
    tokenizer(**options, average=lambda g: seen.append(g) or g)(IMAGES[:1], NOISE[:1], FEATURES[:1])
    first, seen = seen, []
    means = iter(first)
    half = tokenizer(**options, average=lambda g: (next(means) + g) / 2)(IMAGES[1:], NOISE[1:], FEATURES[1:])
    torch.testing.assert_close(half["align_scale"], whole, rtol=1e-4, atol=0.0)


def test_fixed_weight_and_missing_features() -> None:
    module = tokenizer({"align": 0.25}, feature_dim=5, adaptive=False)
    assert module(IMAGES, NOISE, FEATURES)["align_scale"].item() == 0.25
    with pytest.raises(ValueError, match="features"):
        module(IMAGES, NOISE)
    module = tokenizer({"align": 0.25}, feature_dim=5).eval()
    with torch.no_grad():
        assert module(IMAGES, NOISE, FEATURES)["align_scale"].item() == 0.25


def test_perceptual_and_adversarial_terms() -> None:
    found = tokenizer(perceptual=_squares)(IMAGES, NOISE, discriminator=lambda image: image.mean(dim=(1, 2, 3)))
    parts = found["reconstruction"] + found["perceptual"] + 1e-6 * found["kl"]
    torch.testing.assert_close(found["total"].detach(), parts + found["adversarial_scale"] * found["adversarial"])
    assert found["adversarial_scale"] > 0


def test_noise_on_a_latent_is_in_its_own_deviations() -> None:
    latents = torch.stack([NOISE[0].cumsum(0), 100 * NOISE[0].cumsum(0)]).requires_grad_()
    made = disturbed(latents, torch.full_like(NOISE, 0.5))
    deviation = torch.tensor([1.0] * 16 + [2.0] * 16 + [3.0] * 16).std()
    torch.testing.assert_close(
        made - latents, 0.5 * deviation * torch.tensor([1.0, 100.0])[:, None, None, None] * NOISE
    )
    (gradient,) = torch.autograd.grad(made.sum(), latents)
    assert torch.equal(gradient, torch.ones_like(NOISE))


@pytest.mark.parametrize("once", [True, False])
def test_what_is_decoded_is_disturbed_and_the_rest_is_not(once: bool) -> None:
    module = tokenizer(feature_dim=5, one_decoder_backward=once)
    calm, shaken = (module(IMAGES, NOISE, FEATURES, disturbance_BCHW=by) for by in (None, 0.5 * NOISE))
    assert torch.equal(calm["latent"], shaken["latent"]) and torch.equal(calm["kl"], shaken["kl"])
    expected = module.model.decode(disturbed(shaken["latent"], 0.5 * NOISE))
    torch.testing.assert_close(shaken["image"], expected.detach())
    assert (shaken["image"] - calm["image"]).abs().max() > 1e-3


def test_both_adaptive_weights_are_those_of_autograd_by_hand() -> None:
    """The published formula: gradients of the whole reconstruction and of each other term at one weight, their norms'
    ratio with 1e-4 below the line, times 0.5 and w_hyper (papers.md 1.2)."""
    module = tokenizer(NO_MARGINS, feature_dim=5, perceptual=_squares)
    torch.manual_seed(1)
    critic = PatchDiscriminator(in_channels=1, width=4, layers=1)
    found = module(IMAGES, NOISE, FEATURES, discriminator=critic.frozen)

    posterior = module.model.encode(IMAGES)
    z = posterior.mean + posterior.std * NOISE
    recon = module.model.decode(z)
    nll = (IMAGES - recon).abs().sum() / 2 + _squares(IMAGES, recon).mean() * IMAGES[0].numel()
    projected = torch.einsum("dc,bchw->bdhw", module.linear_proj.weight[:, :, 0, 0], z)  # type: ignore[union-attr]
    unit_z, unit_f = F.normalize(projected.flatten(2), dim=1), F.normalize(FEATURES.flatten(2), dim=1)
    cosine = (1 - (unit_z * unit_f).sum(dim=1)).relu().mean()
    gram = torch.einsum("bdi,bdj->bij", unit_z, unit_z) - torch.einsum("bdi,bdj->bij", unit_f, unit_f)
    align, fooled = cosine + gram.abs().mean(), -critic(recon).mean()

    def at(loss: Tensor, weight: Tensor) -> float:
        return float(torch.autograd.grad(loss, weight, retain_graph=True)[0].norm())

    last, first = module.model.decoder.conv_out.weight, module.model.encoder.conv_out.weight
    gan = 0.5 * at(nll, last) / (at(fooled, last) + 1e-4)
    pull = 0.1 * at(nll, first) / (at(align, first) + 1e-4)
    assert found["adversarial_scale"].item() == pytest.approx(gan, rel=1e-4)
    assert found["align_scale"].item() == pytest.approx(pull, rel=1e-4)
    total = nll + 1e-6 * posterior.kl().mean() + gan * fooled + pull * align
    torch.testing.assert_close(found["total"], total, rtol=1e-5, atol=1e-4)
    # And the gradient of the total is that of this sum with both weights held.
    parameters = list(module.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(found["total"], parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_weights_of_a_call_take_the_place_of_the_modules() -> None:
    module = tokenizer({"align": 0.0, "adversarial": 0.0}, feature_dim=5, perceptual=_squares)
    critic = PatchDiscriminator(in_channels=1, width=4, layers=1)
    assert module(IMAGES, NOISE, discriminator=critic.frozen).keys().isdisjoint({"cosine", "adversarial"})
    later = TokenizerWeights(perceptual=0.0, align=0.2, cosine_margin=0.9, distance_margin=0.0)
    found = module(IMAGES, NOISE, FEATURES, critic.frozen, later)
    assert "perceptual" not in found and {"cosine", "adversarial"} <= found.keys()
    other = module(IMAGES, NOISE, FEATURES, critic.frozen, replace(later, cosine_margin=0.0))
    assert (other["cosine"] - found["cosine"]).item() == pytest.approx(0.9, abs=0.3)


def test_alignment_terms_by_hand() -> None:
    """Two cells of two channels: cosines that one can compute in the head."""
    z = torch.tensor([[[[1.0, 1.0]], [[0.0, 1.0]]]])  # cells (1, 0) and (1, 1)
    f = torch.tensor([[[[0.0, 2.0]], [[3.0, 2.0]]]])  # cells (0, 3) and (2, 2)
    root = math.sqrt(0.5)
    assert marginal_cosine(z, f, 0.0).item() == pytest.approx((1.0 + 0.0) / 2)  # cosines 0 and 1
    assert marginal_cosine(z, f, 0.5).item() == pytest.approx(0.25)
    # cos(z_1, z_2) = cos(f_1, f_2) = root: no difference; turning f_2 to (-1, 1) makes it root against root.
    assert marginal_distance_matrix(z, f, 0.0).item() == pytest.approx(0.0, abs=1e-6)
    opposite = torch.tensor([[[[0.0, 0.0]], [[3.0, -3.0]]]])  # cos(f_1, f_2) = -1
    assert marginal_distance_matrix(z, opposite, 0.25).item() == pytest.approx(2 * (root + 1 - 0.25) / 4, abs=1e-6)


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
        assert found.keys() == {"total", "mse", "cosine", "kl", "latent_mean", "latent_std"}
        optimizer.zero_grad()
        found["total"].backward()
        optimizer.step()
        losses.append(found["total"].item())
    assert losses[-1] < 0.5 * losses[0]
