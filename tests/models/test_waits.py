"""In a step of training or sampling the host queues work and never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from models import edm
from models.cascade import Cascade, Conditioned, TrainableCascade, no_condition
from models.cascade_dit import CascadeDiT
from models.clocks import SemanticFirst, Synchronous
from models.discriminator import PatchDiscriminator
from models.groups import single_group
from models.guidance import AutoGuidance, ClassifierFree, NoGuidance
from models.objectives import TrainableVelocity, VelocityMatching
from models.semantic_vae import SemanticVAE
from models.solvers import Solver, sample
from models.tokenizer_losses import TrainableSemanticVAE, TrainableTokenizer
from tests.helpers.waits import DEVICES, Waited, no_waits
from tests.models.conftest import PAIR, small_batch, small_dit
from tests.models.test_autoencoders import small

devices = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool((x > 0).any()),
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.new_tensor([1.0]),
        lambda x: x * torch.tensor([2.0], device=x.device),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
@devices
def test_a_wait_is_found(wait: Callable[[Tensor], Any], device: str) -> None:
    x = torch.ones(3, device=device)
    with pytest.raises((Waited, RuntimeError, NotImplementedError)), no_waits(device):
        wait(x)


@devices
def test_a_training_step_with_clocks_weights_and_alignment(device: str) -> None:
    objective = VelocityMatching(
        PAIR, SemanticFirst(0.3), group_weights=(1.0, 2.0), align_weight=0.5, align_mode="cos_mse"
    )
    module = TrainableVelocity(small_dit(), objective).to(device)
    x, _, y = (each.to(device) for each in small_batch())
    noise, u, features = torch.randn_like(x), torch.rand(3, device=device), torch.randn(3, 12, 4, 4, device=device)
    with no_waits(device):
        module(x, y, noise, u, features, images_seen=7)["total"].backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@devices
def test_a_training_step_of_a_cascade(device: str) -> None:
    module = TrainableCascade(cascade(), VelocityMatching(single_group(2), Synchronous())).to(device)
    y, cuts = torch.zeros(3, dtype=torch.long, device=device), Cascade((2, 4))
    for side in (2, 4):
        x = torch.randn(3, 2, side, side, device=device)
        condition, level = no_condition(x)
        if side == 4:
            lower = cuts.lowered(x, 2)
            level = torch.rand(3, device=device)
            condition = cuts.condition(lower, torch.randn_like(lower), level, side)
        with no_waits(device):
            given = {"condition_BCHW": condition, "level_B": level, "weight": 0.5}
            module(x, y, torch.randn_like(x), torch.rand(3, device=device), **given)["total"].backward()


@pytest.mark.parametrize("adversarial", [False, True])
@devices
def test_a_training_step_of_a_tokenizer(device: str, adversarial: bool) -> None:
    network = small(in_channels=3, out_channels=3, attention_levels=(1,))
    module = TrainableTokenizer(network, feature_dim=6, perceptual=lambda x, y: (x - y).abs().mean((1, 2, 3)))
    module.to(device)
    images, cells = torch.rand(2, 3, 32, 32, device=device), 32 // network.downscale
    noise = torch.randn(2, network.embed_dim, cells, cells, device=device)
    features = torch.randn(2, 6, cells, cells, device=device)
    frozen = PatchDiscriminator(width=4, layers=2, norm="group").to(device).frozen if adversarial else None
    with no_waits(device):
        module.train()(images, noise, features, frozen)["total"].backward()
        with torch.no_grad():
            module.eval()(images, noise, features, frozen)


@devices
def test_a_training_step_of_a_semantic_vae(device: str) -> None:
    module = TrainableSemanticVAE(SemanticVAE(feature_dim=4, width=8, depth=1, num_heads=2)).to(device)
    channels = module.model.encode(torch.randn(2, 4, 2, 2, device=device)).mean.shape[1]
    with no_waits(device):
        module(torch.randn(2, 4, 2, 2, device=device), torch.randn(2, channels, 2, 2, device=device))[
            "total"
        ].backward()


GUIDANCE = {
    "none": lambda _weak: NoGuidance(),
    "some channels, an interval": lambda _weak: ClassifierFree(
        (3.0, 2.0), 5, channels=3, interval=((0.1, 0.6), (0.3, 1.0)), groups=PAIR
    ),
    "a weak network": lambda weak: AutoGuidance(weak, (1.5, 1.0), groups=PAIR),
}


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("guidance", GUIDANCE)
@devices
def test_sampling_with_two_clocks(device: str, guidance: str, solver: Solver) -> None:
    main, weak = small_dit().to(device), small_dit().to(device)
    x, _, y = (each.to(device) for each in small_batch())
    shaken = torch.randn_like(x)
    with no_waits(device):
        found = sample(
            GUIDANCE[guidance](weak)(main),
            x,
            y,
            clock=SemanticFirst(0.3),
            groups=PAIR,
            solver=solver,
            steps=4,
            shift=0.3,
            step_noise=lambda _step: shaken,
        )
    assert found.shape == x.shape and found.device.type == device


@devices
def test_sampling_of_a_cascades_finer_stage(device: str) -> None:
    network, cuts = cascade().to(device), Cascade((2, 4))
    y, lower = torch.zeros(3, dtype=torch.long, device=device), torch.randn(3, 2, 2, 2, device=device)
    noise, raised = torch.randn_like(lower), torch.randn(3, 2, 4, 4, device=device)
    with no_waits(device):
        level = lower.new_full((3,), 0.1)
        given = Conditioned(network, cuts.condition(lower, noise, level, 4), level)
        velocity = ClassifierFree(2.0, 3, interval=(0.4, 1.0))(given)
        sample(velocity, raised, y, clock=Synchronous(), groups=single_group(2), steps=3)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc"])
@devices
def test_denoising_in_pixels(device: str, solver: str) -> None:
    noise, y = torch.randn(3, 2, 4, 4, device=device), torch.zeros(3, dtype=torch.long, device=device)

    def denoiser(x: Tensor, t_B1: Tensor, _y: Tensor) -> Tensor:
        return x * t_B1.view(-1, 1, 1, 1)

    guided = ClassifierFree(2.0, 3, interval=(0.4, 1.0))(denoiser)
    with no_waits(device):
        edm.sample(guided, noise, y, edm.sigma_grid(5), solver=solver)


def test_an_adaptive_solver_waits() -> None:
    """It reads its error at every step; were that not found, nothing here would be shown."""
    x, _, y = (each.to("meta") for each in small_batch())
    adaptive = partial(sample, clock=SemanticFirst(0.3), groups=PAIR, solver="dopri5")
    with pytest.raises((Waited, RuntimeError, NotImplementedError)), no_waits("meta"):
        adaptive(small_dit().to("meta"), x, y)


def cascade() -> CascadeDiT:
    return CascadeDiT(resolutions=(2, 4), in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
