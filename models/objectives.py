"""Objectives: what a training step minimises, as named terms that are weighted and summed once.

Random numbers belong to images: noise, the uniform number behind the time and dropped labels come from the
caller. Source: papers.md 1.5 (velocity matching, direction loss), 2.5 (clocks, group weights, alignment).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clocks import Clock
from models.groups import ChannelGroups
from models.routing import Route
from models.solvers import shifted

AlignMode = Literal["cos", "mse", "cos_mse"]


@dataclass(frozen=True)
class LossTerms:
    """Scalar terms and their weights; `total` is the weighted sum. `monitors` are logged, never summed."""

    terms: dict[str, Tensor]
    weights: dict[str, float]
    monitors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """The scalar to minimise."""
        return torch.stack([self.weights[name] * term for name, term in self.terms.items()]).sum()

    def as_dict(self) -> dict[str, Tensor]:
        """{"total", each term unweighted, each monitor}, all but the total detached."""
        logged = {name: value.detach() for name, value in (self.terms | self.monitors).items()}
        return {"total": self.total} | logged


@dataclass(frozen=True)
class TimeDistribution:
    """From a uniform number in (0, 1) to a time in (0, 1).

    name: "logit_normal" (sigmoid of a standard normal) or "uniform".
    uniform_after_images: number of images seen from which times are uniform (the published 800-epoch run
        switches late, papers.md 1.5); None never switches.
    """

    name: Literal["logit_normal", "uniform"] = "logit_normal"
    uniform_after_images: int | None = None
    shift: float = 1.0
    """Of all times, as `models.solvers.shifted`: below 1 there are more of them near noise."""

    def __post_init__(self) -> None:
        if self.name not in ("logit_normal", "uniform"):
            raise ValueError(f"time distribution must be 'logit_normal' or 'uniform', found '{self.name}'")

    def __call__(self, u_B: Tensor, images_seen: int = 0) -> Tensor:
        """Times (B,), dtype kept."""
        switched = self.uniform_after_images is not None and images_seen >= self.uniform_after_images
        if self.name == "uniform" or switched:
            return shifted(u_B, self.shift)
        return shifted(torch.sigmoid(torch.special.ndtri(u_B)), self.shift)


@dataclass(frozen=True)
class VelocityMatching:
    """Match the velocity x1 - x0 of straight paths x_t = t x1 + (1 - t) x0, each group at its own time.

    group_weights: weight of each group's squared error before the mean over all channels (None: all 1;
        published for SFD: texture 1, semantic 2).
    direction_weight: weight of 1 - cos over all channels per cell.
    direction_floor: see `direction_error`; 1e-8 is published, 1 our choice (targets have norms about sqrt(2 C)).
    align_weight, align_mode: weight and form of the alignment of the projection with the target features.
    align_until: images seen from which the alignment counts no more; None never.
    contrastive_weight: of the squared error to another image's target, which is driven up (`strangers`).
    routed: first and last block that only the kept tokens of `loss` go through.
    Raises ValueError when groups, clock and weights disagree.
    """

    groups: ChannelGroups
    clock: Clock
    group_weights: tuple[float, ...] | None = None
    direction_weight: float = 1.0
    direction_floor: float = 1.0
    align_weight: float = 0.0
    align_mode: AlignMode = "cos"
    align_until: int | None = None
    contrastive_weight: float = 0.0
    routed: tuple[int, int] = (1, 1)
    times: TimeDistribution = TimeDistribution()

    def __post_init__(self) -> None:
        if self.clock.groups != len(self.groups):
            raise ValueError(
                f"the clock has {self.clock.groups} groups, the latent has {len(self.groups)} "
                f"({', '.join(self.groups.names)})"
            )
        if self.group_weights is not None and len(self.group_weights) != len(self.groups):
            raise ValueError(
                f"group_weights needs {len(self.groups)} numbers, one per group "
                f"({', '.join(self.groups.names)}), found {len(self.group_weights)}"
            )
        if self.align_mode not in ("cos", "mse", "cos_mse"):
            raise ValueError(f"align_mode must be 'cos', 'mse' or 'cos_mse', found '{self.align_mode}'")

    def train_times(self, u_B: Tensor, images_seen: int = 0) -> Tensor:
        """Times (B, G) from uniform numbers (B,)."""
        return self.clock.train_times(self.times(u_B.float(), images_seen))

    def interpolate(self, x1_BCHW: Tensor, noise_BCHW: Tensor, t_BG: Tensor) -> Tensor:
        """The point x_t on the straight path from noise to data, each group at its own time."""
        t = self.groups.spread(t_BG).to(x1_BCHW.dtype)
        return t * x1_BCHW + (1 - t) * noise_BCHW

    def loss(
        self,
        model: nn.Module,
        x1_BCHW: Tensor,
        y_B: Tensor,
        noise_BCHW: Tensor,
        u_B: Tensor,
        align_target_BChw: Tensor | None = None,
        images_seen: int = 0,
        kept_BK: Tensor | None = None,
    ) -> LossTerms:
        """Terms for normalised latents x1_BCHW and labels y_B (dropped ones already null), with noise of the
        same shape and one uniform number in (0, 1) per image. `model` is (x, t, y) -> velocity; with an
        align_weight it also needs `forward_with_alignment`, and the target features (B, D, h, w).
        kept_BK: tokens that go through the blocks of `routed` (`models/routing.py`); None are all.
        """
        t_BG = self.train_times(u_B, images_seen)
        terms = self.loss_at(model, x1_BCHW, y_B, noise_BCHW, t_BG, align_target_BChw, kept_BK)
        if self.align_weight > 0 and not self.aligns(images_seen):
            # The head stays in the graph: every layout then has gradients, of zero, for the same weights.
            terms.weights["alignment"] = 0.0
        return terms

    def aligns(self, images_seen: int) -> bool:
        """Whether the alignment still counts."""
        return self.align_weight > 0 and (self.align_until is None or images_seen < self.align_until)

    def loss_at(
        self,
        model: nn.Module,
        x1_BCHW: Tensor,
        y_B: Tensor,
        noise_BCHW: Tensor,
        t_BG: Tensor,
        align_target_BChw: Tensor | None = None,
        kept_BK: Tensor | None = None,
    ) -> LossTerms:
        """As `loss`, at given times (B, G): for validation grids and loss by time bin."""
        x_t = self.interpolate(x1_BCHW, noise_BCHW, t_BG)
        projection = None
        told = {} if kept_BK is None else {"route": Route(*self.routed, kept_BK)}
        if self.align_weight > 0:
            if align_target_BChw is None:
                raise ValueError("align_weight > 0 needs align_target_BChw: the foundation features")
            velocity, projection = model.forward_with_alignment(x_t, t_BG, y_B, **told)  # type: ignore[operator]
        else:
            velocity = model(x_t, t_BG, y_B, **told)
        target = x1_BCHW - noise_BCHW
        found = self.terms(velocity, target, projection, align_target_BChw)
        found.monitors.update(self._by_time(velocity, target, t_BG))
        return found

    @torch.no_grad()
    def _by_time(self, velocity_BCHW: Tensor, target_BCHW: Tensor, t_BG: Tensor) -> dict[str, Tensor]:
        """Under "by_time/<group>", each image's time of the group and its mean squared error there, (2, B)."""
        squared = (velocity_BCHW.float() - target_BCHW.float()).square().flatten(2).mean(dim=2)
        return {
            f"by_time/{name}": torch.stack([t_BG[:, group].float(), squared[:, part].mean(dim=1)])
            for group, (name, part) in enumerate(zip(self.groups.names, self.groups.slices, strict=True))
        }

    def terms(
        self,
        velocity_BCHW: Tensor,
        target_BCHW: Tensor,
        projection_BDhw: Tensor | None = None,
        align_target_BDhw: Tensor | None = None,
    ) -> LossTerms:
        """Means over the batch of the per-image losses below, computed in float32."""
        v, target = velocity_BCHW.float(), target_BCHW.float()
        terms = {"velocity": velocity_error(v, target, self.groups, self.group_weights).mean()}
        weights = {"velocity": 1.0}
        if self.contrastive_weight > 0:
            other = velocity_error(v, strangers(target), self.groups, self.group_weights)
            terms["contrastive"], weights["contrastive"] = other.mean(), -self.contrastive_weight
        if self.direction_weight > 0:
            terms["direction"] = direction_error(v, target, self.direction_floor).mean()
            weights["direction"] = self.direction_weight
        if projection_BDhw is not None and align_target_BDhw is not None:
            terms["alignment"] = alignment_error(projection_BDhw, align_target_BDhw, self.align_mode).mean()
            weights["alignment"] = self.align_weight
        monitors: dict[str, Tensor] = {}
        with torch.no_grad():
            squared = (v - target).square().flatten(2).mean(dim=2)
            monitors["velocity_per_image"] = squared.mean(dim=1)
            if len(self.groups) > 1:
                for name, part in zip(self.groups.names, self.groups.slices, strict=True):
                    monitors[f"velocity/{name}"] = squared[:, part].mean()
        return LossTerms(terms, weights, monitors)


def velocity_error(
    v_BCHW: Tensor, target_BCHW: Tensor, groups: ChannelGroups, group_weights: tuple[float, ...] | None = None
) -> Tensor:
    """Squared error per image, (B,): mean over all channels and cells, groups weighted before the mean."""
    squared = (v_BCHW - target_BCHW).square()
    if group_weights is not None:
        squared = groups.weighted(squared, group_weights)
    return squared.flatten(1).mean(dim=1)


def strangers(target_BCHW: Tensor) -> Tensor:
    """Another image's target for each image: its neighbour's, where images are paired two by two.

    Contrastive flow matching (arXiv 2506.05350) draws another image of the batch. Pairs of neighbours are our choice:
    they are the same however a batch is cut over workers and accumulation steps, as long as its pieces are even.
    Raises ValueError for an odd number of images.
    """
    if len(target_BCHW) % 2:
        raise ValueError(
            f"the contrastive term pairs images, found {len(target_BCHW)} of them: use a batch whose pieces are even"
        )
    return target_BCHW.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def direction_error(v_BCHW: Tensor, target_BCHW: Tensor, floor: float = 1e-8) -> Tensor:
    """1 - cosine over all channels, (B,): mean over cells.

    floor: shorter velocities count as this long, which bounds the gradient by 1 / floor. A network that begins at
        zero has no direction: with the published 1e-8 its first gradient is a hundred million times the later ones,
        and Adam's second moment remembers it for thousands of steps.
    """
    unit = target_BCHW / target_BCHW.norm(dim=1, keepdim=True).clamp_min(1e-8)
    cosine = (v_BCHW * unit).sum(dim=1) / v_BCHW.norm(dim=1).clamp_min(floor)
    return (1 - cosine).flatten(1).mean(dim=1)


def alignment_error(projection_BDhw: Tensor, target_BDhw: Tensor, mode: AlignMode = "cos") -> Tensor:
    """Distance of projected tokens to foundation features, (B,): "cos" is 1 - cosine over features, "mse"
    the mean square, "cos_mse" the mean of the two. Raises ValueError when the grids differ.
    """
    if projection_BDhw.shape != target_BDhw.shape:
        raise ValueError(
            f"alignment needs features on the grid of the tokens: projection {tuple(projection_BDhw.shape)}, "
            f"features {tuple(target_BDhw.shape)}; check align_dim and the foundation model's input size"
        )
    projection, target = projection_BDhw.float(), target_BDhw.float()
    cosine = (1 - F.cosine_similarity(projection, target, dim=1)).flatten(1).mean(dim=1)
    squared = (projection - target).square().flatten(1).mean(dim=1)
    return {"cos": cosine, "mse": squared, "cos_mse": 0.5 * (cosine + squared)}[mode]


class Objective(Protocol):
    """What `TrainableVelocity` needs of an objective; arguments as `VelocityMatching.loss`."""

    def loss(
        self,
        model: nn.Module,
        x1_BCHW: Tensor,
        y_B: Tensor,
        noise_BCHW: Tensor,
        u_B: Tensor,
        align_target_BChw: Tensor | None = None,
        images_seen: int = 0,
    ) -> LossTerms: ...


class TrainableVelocity(nn.Module):
    """A network and its objective as one module, so that a training engine (DDP, DeepSpeed) can wrap the
    whole step's forward pass. `.model` is the network; the objective has no parameters.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(
        self,
        x1_BCHW: Tensor,
        y_B: Tensor,
        noise_BCHW: Tensor,
        u_B: Tensor,
        align_target_BChw: Tensor | None = None,
        images_seen: int = 0,
        kept_BK: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"total": scalar to minimise, "velocity", "direction", "alignment", "velocity/<group>" (scalars),
        "velocity_per_image" (B,), "by_time/<group>" (2, B)}; all but the total detached. Arguments as
        `VelocityMatching.loss`.
        """
        terms = self._terms(self.model, x1_BCHW, y_B, noise_BCHW, u_B, align_target_BChw, images_seen, kept_BK)
        return terms.as_dict()

    def _terms(self, model: Any, *arguments: Any) -> LossTerms:
        """Of `objective.loss`; only an objective that knows routing is told which tokens are kept."""
        *known, kept_BK = arguments
        told = {} if kept_BK is None else {"kept_BK": kept_BK}
        return self.objective.loss(model, *known, **told)
