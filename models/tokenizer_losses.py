"""Losses of the two tokenizers, as named terms. Source: papers.md 1.2 (VA-VAE), 2.2 (Semantic VAE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.image_autoencoder import ImageAutoencoder
from models.objectives import LossTerms
from models.semantic_vae import SemanticVAE

GRADIENT_FLOOR = 1e-4


def reconstruction_error(x_BCHW: Tensor, recon_BCHW: Tensor, kind: Literal["l1", "l2"] = "l1") -> Tensor:
    """Absolute or squared error, (B,), summed over channels and pixels as published."""
    difference = x_BCHW.float() - recon_BCHW.float()
    return (difference.abs() if kind == "l1" else difference.square()).flatten(1).sum(dim=1)


def marginal_cosine(z_BDhw: Tensor, f_BDhw: Tensor, margin: float = 0.5) -> Tensor:
    """Mean over cells of relu(1 - margin - cos(z, f)), a scalar: L_mcos."""
    _same_grid(z_BDhw, f_BDhw)
    return F.relu(1 - margin - F.cosine_similarity(z_BDhw.float(), f_BDhw.float(), dim=1)).mean()


def marginal_distance_matrix(z_BDhw: Tensor, f_BDhw: Tensor, margin: float = 0.25) -> Tensor:
    """Mean over pairs of cells of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin), a scalar: L_mdms.
    The widths of z and f may differ; both are the projected latent and the features as published.
    """
    _same_grid(z_BDhw, f_BDhw)

    def cosines(x_BDhw: Tensor) -> Tensor:
        unit = F.normalize(x_BDhw.float().flatten(2), dim=1)
        return unit.transpose(1, 2) @ unit

    return F.relu((cosines(z_BDhw) - cosines(f_BDhw)).abs() - margin).mean()


def disturbed(z_BCHW: Tensor, by_BCHW: Tensor) -> Tensor:
    """Latents with `by` added in deviations of each one's own numbers, over channels and cells: no batch enters, and no
    encoder escapes by making its latents larger. The deviation has no gradient.
    """
    deviation_B = z_BCHW.detach().float().flatten(1).std(dim=1)
    return z_BCHW + by_BCHW * deviation_B[:, None, None, None].to(z_BCHW.dtype)


def adaptive_weight(main_grad: Tensor, other_grad: Tensor, *, maximum: float) -> Tensor:
    """|main_grad| / (|other_grad| + 1e-4), clipped to [0, maximum], detached, a scalar.
    Balances a second loss against the reconstruction, by the gradients of both at one weight.
    """
    ratio = main_grad.norm() / (other_grad.norm() + GRADIENT_FLOOR)
    return ratio.clamp(0.0, maximum).detach()


class _Known(torch.autograd.Function):
    """A scalar whose gradients were computed before; backward hands them out instead of computing them again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors_and_gradients[count:])
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, None, *(upstream[0] * gradient for gradient in gradients), *(None for _ in gradients))


def hinge_generator(logits_fake: Tensor) -> Tensor:
    """-mean D(reconstruction), a scalar."""
    return -logits_fake.float().mean()


def hinge_discriminator(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Half the sum of both hinges, a scalar."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


@dataclass(frozen=True)
class TokenizerWeights:
    """Weights and margins of the VA-VAE objective's terms; a weight of 0 leaves a term out (papers.md 1.2)."""

    perceptual: float = 1.0
    kl: float = 1e-6
    adversarial: float = 0.5
    """Of the adaptive weight, or by itself where the module is not adaptive."""
    align: float = 0.1
    """The published w_hyper; as above."""
    cosine_margin: float = 0.5
    distance_margin: float = 0.25
    """m1 and m2."""


class TrainableTokenizer(nn.Module):
    """An autoencoder with the generator side of the VA-VAE objective as one module for a training engine.
    `.model` is the autoencoder; `linear_proj` (published name) projects latents up to the feature width.

    feature_dim: width of the foundation features; None leaves alignment out.
    adaptive: multiply the adversarial and alignment weights by ratios of gradient norms.
    perceptual: (x or what was seen of it, recon) -> (B,) or broadcastable; it counts once per pixel and channel, as
        published.
    weights: of all terms, where a call does not give others.
    average: mean of a tensor over all workers, so that the adaptive weights are those of the whole batch.
    one_decoder_backward: take the decoder's gradients once, for the adaptive weight and for training, instead of
        twice. The same gradients; needs whole (unsharded) parameters while the loss is computed.
    """

    def __init__(
        self,
        model: ImageAutoencoder,
        *,
        feature_dim: int | None = None,
        reconstruction: Literal["l1", "l2"] = "l1",
        adaptive: bool = True,
        perceptual: Callable[[Any, Tensor], Tensor] | None = None,
        weights: TokenizerWeights | None = None,
        average: Callable[[Tensor], Tensor] | None = None,
        one_decoder_backward: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self.average, self.one_decoder_backward = average, one_decoder_backward
        self.linear_proj = nn.Conv2d(model.embed_dim, feature_dim, 1, bias=False) if feature_dim else None
        self.reconstruction: Literal["l1", "l2"] = reconstruction
        self.adaptive, self.perceptual = adaptive, perceptual
        self.weights = weights or TokenizerWeights()

    def forward(
        self,
        images_B3HW: Tensor,
        noise_BCHW: Tensor,
        features_BDhw: Tensor | None = None,
        discriminator: Callable[[Tensor], Tensor] | None = None,
        weights: TokenizerWeights | None = None,
        seen: Sequence[Tensor] | None = None,
        disturbance_BCHW: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"total", "reconstruction", "kl", "latent_mean", "latent_std", and where asked "perceptual", "cosine",
        "distance", "align_scale", "adversarial", "adversarial_scale"} for images in [-1, 1]; also "image" and
        "latent" (detached), for metrics and the discriminator's own step.

        discriminator: images to logits, with gradients to the images; given once adversarial training has begun.
        weights: those of this step, in place of the module's own.
        seen: what the perceptual term takes in the images' place, where it was found out with the features.
        disturbance_BCHW: what is decoded is the latent with so much on top, in deviations of each image's own latent.
        Raises ValueError when features are needed and missing.
        """
        w = weights or self.weights
        posterior = self.model.encode(images_B3HW)
        z = posterior.sample(noise_BCHW)
        aligned, adversarial = self.linear_proj is not None and w.align > 0, w.adversarial > 0
        balanced = self.adaptive and self.training and torch.is_grad_enabled()
        # With a discriminator the decoder has two gradients, of which only one balances the alignment.
        once = balanced and self.one_decoder_backward and aligned and discriminator is None
        latent = z.detach().requires_grad_() if once else z
        recon = self.model.decode(latent if disturbance_BCHW is None else disturbed(latent, disturbance_BCHW))
        terms = {"reconstruction": reconstruction_error(images_B3HW, recon, self.reconstruction).mean()}
        weighted = {"reconstruction": 1.0}
        if self.perceptual is not None and w.perceptual > 0:
            terms["perceptual"] = (
                self.perceptual(images_B3HW if seen is None else seen, recon).mean() * images_B3HW[0].numel()
            )
            weighted["perceptual"] = w.perceptual
        fidelity, at_z = LossTerms(dict(terms), dict(weighted)).total, None
        if once:
            fidelity, at_z = self._settled(fidelity, z, latent)
        terms["kl"], weighted["kl"] = posterior.kl().mean(), w.kl
        total = fidelity + w.kl * terms["kl"]
        others: dict[str, Tensor] = {"latent_mean": z.float().mean(), "latent_std": z.float().std()}
        if aligned:
            if features_BDhw is None:
                raise ValueError("this tokenizer is trained with alignment: give features_BDhw")
            projected = self.linear_proj(z)  # type: ignore[misc]
            cosine = marginal_cosine(projected, features_BDhw, w.cosine_margin)
            distance = marginal_distance_matrix(projected, features_BDhw, w.distance_margin)
            main = (z, at_z) if once else (fidelity, None)
            encoder = self.model.last_encoder_weight
            scale = self._scale(main, cosine + distance, encoder, 1e8) if balanced else torch.ones_like(fidelity)
            others |= {"align_scale": w.align * scale, "cosine": cosine, "distance": distance}
            total = total + others["align_scale"] * (cosine + distance)
        if discriminator is not None and adversarial:
            fooled = hinge_generator(discriminator(recon))
            decoder = self.model.last_decoder_weight
            scale = self._scale((fidelity, None), fooled, decoder, 1e4) if balanced else torch.ones_like(fidelity)
            others |= {"adversarial_scale": w.adversarial * scale, "adversarial": fooled}
            total = total + others["adversarial_scale"] * fooled
        named = LossTerms(terms, weighted, others).as_dict()
        return named | {"total": total, "image": recon.detach(), "latent": z.detach()}

    def _settled(self, fidelity: Tensor, z: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The loss with its gradients at z and in the decoder already taken, and the one at z."""
        trained = [parameter for parameter in self.model.decoding if parameter.requires_grad]
        gradients = torch.autograd.grad(fidelity, [latent, *trained])
        settled: Tensor = _Known.apply(fidelity.detach(), len(gradients), z, *trained, *gradients)
        return settled, gradients[0]

    def _scale(self, main: tuple[Tensor, Tensor | None], other: Tensor, weight: Tensor, maximum: float) -> Tensor:
        """The adaptive weight of `other` against `main`, a tensor and the gradient there (None for a loss)."""
        (main_grad,) = torch.autograd.grad(main[0], weight, main[1], retain_graph=True)
        (other_grad,) = torch.autograd.grad(other, weight, retain_graph=True)
        if self.average is not None:
            main_grad, other_grad = self.average(main_grad), self.average(other_grad)
        return adaptive_weight(main_grad, other_grad, maximum=maximum)


def semantic_terms(
    features_BDhw: Tensor,
    recon_BDhw: Tensor,
    kl_B: Tensor,
    *,
    mse_weight: float = 1.0,
    cosine_weight: float = 1.0,
    kl_weight: float = 1e-7,
    cosine_axis: Literal["feature", "token"] = "feature",
) -> LossTerms:
    """Terms "mse" (mean over elements), "cosine" (1 - cos) and "kl" of the Semantic VAE.

    cosine_axis: "feature" compares the feature vectors of each token, as the paper says; "token" compares
        each feature along the tokens, as the published training code does by accident (papers.md 2.2).
    """
    features_BDN, recon_BDN = features_BDhw.float().flatten(2), recon_BDhw.float().flatten(2)
    axis = 1 if cosine_axis == "feature" else 2
    cosine = 1 - F.cosine_similarity(features_BDN, recon_BDN, dim=axis)
    return LossTerms(
        {"mse": F.mse_loss(recon_BDN, features_BDN), "cosine": cosine.mean(), "kl": kl_B.mean()},
        {"mse": mse_weight, "cosine": cosine_weight, "kl": kl_weight},
    )


class TrainableSemanticVAE(nn.Module):
    """A Semantic VAE with its objective as one module for a training engine; `.model` is the network."""

    def __init__(
        self,
        model: SemanticVAE,
        *,
        mse_weight: float = 1.0,
        cosine_weight: float = 1.0,
        kl_weight: float = 1e-7,
        cosine_axis: Literal["feature", "token"] = "feature",
    ) -> None:
        super().__init__()
        self.model = model
        self.mse_weight, self.cosine_weight, self.kl_weight = mse_weight, cosine_weight, kl_weight
        self.cosine_axis: Literal["feature", "token"] = cosine_axis

    def forward(self, features_BDhw: Tensor, noise_BChw: Tensor) -> dict[str, Tensor]:
        """{"total", "mse", "cosine", "kl", "latent_mean", "latent_std"}; all but the total detached."""
        recon, posterior, s_BChw = self.model(features_BDhw, noise_BChw)
        latent = s_BChw.detach().float()
        terms = semantic_terms(
            features_BDhw,
            recon,
            posterior.kl(),
            mse_weight=self.mse_weight,
            cosine_weight=self.cosine_weight,
            kl_weight=self.kl_weight,
            cosine_axis=self.cosine_axis,
        )
        return terms.as_dict() | {"latent_mean": latent.mean(), "latent_std": latent.std()}


def _same_grid(z_BDhw: Tensor, f_BDhw: Tensor) -> None:
    if z_BDhw.shape[0] != f_BDhw.shape[0] or z_BDhw.shape[-2:] != f_BDhw.shape[-2:]:
        raise ValueError(
            f"latent and features must lie on one grid, found {tuple(z_BDhw.shape)} and "
            f"{tuple(f_BDhw.shape)}; set the foundation model's input_size or layer"
        )
