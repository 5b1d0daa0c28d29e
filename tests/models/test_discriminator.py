"""The PatchGAN: names, sizes, and whom its gradients reach."""

from __future__ import annotations

import pytest
import torch

from models.discriminator import PatchDiscriminator, TrainableDiscriminator
from models.lightningdit import parameter_count
from models.tokenizer_losses import hinge_generator


def test_it_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.0.bias": (64,),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.3.bias": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.6.bias": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.9.bias": (512,),
        "main.11.weight": (1, 512, 4, 4),
        "main.11.bias": (1,),
    }
    assert parameter_count(model) == 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512) + 64 + 1 + 2 * 896
    assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert model.main[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.main[3].weight.mean().item() == pytest.approx(1.0, abs=0.01)


def test_a_logit_sees_seventy_pixels() -> None:
    model = PatchDiscriminator(width=4, norm="group")
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)):
        norm.forward = lambda x: x  # type: ignore[method-assign]  # which sees all of the image
    model(image)[0, 0, 15, 15].backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(dim=0).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [70, 70]


def test_frozen_logits_teach_the_image_alone() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(width=8, layers=2)
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = model.frozen(image)
    torch.testing.assert_close(logits, model(image))
    hinge_generator(logits).backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_its_own_loss_is_the_hinge_and_lowers_itself() -> None:
    torch.manual_seed(0)
    module = TrainableDiscriminator(PatchDiscriminator(width=8, layers=2))
    real, fake = torch.randn(8, 3, 32, 32), 0.5 * torch.randn(8, 3, 32, 32) + 0.5
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, betas=(0.5, 0.9))
    losses = []
    for _ in range(15):
        found = module(real, fake)
        logits = module.model(real), module.model(fake)
        by_hand = 0.5 * ((1 - logits[0]).clamp_min(0).mean() + (1 + logits[1]).clamp_min(0).mean())
        torch.testing.assert_close(found["total"], by_hand)
        optimizer.zero_grad()
        found["total"].backward()
        optimizer.step()
        losses.append(found["total"].item())
    assert losses[-1] < 0.5 * losses[0]
    assert module(real, fake)["logit_real"] > module(real, fake)["logit_fake"]


def test_batch_statistics_are_of_the_batch_and_group_statistics_of_the_image() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 32, 32)
    for norm, alike in (("batch", False), ("group", True)):
        model = PatchDiscriminator(width=8, layers=2, norm=norm).eval()  # type: ignore[arg-type]
        assert torch.allclose(model(images)[:2], model(images[:2]), atol=1e-5) is alike
