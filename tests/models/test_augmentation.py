"""Non-leaky augmentation: what is done to an image is what the network is told, and nothing done is told as nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.augmentation import DRAWS, Augmentation
from models.cascade_unet import CascadeUNet
from models.sizes import AUGMENTATION_LABELS
from tests.models.conftest import SMALL_UNET

NEVER, ALWAYS = 9.0, -9.0
"""Draws that are uniformly near 1, above any probability, and near 0."""


def draws(**chosen: float) -> Tensor:
    """One image's, of which nothing comes but what is chosen; kinds by number, values by name."""
    row = torch.zeros(1, DRAWS)
    row[:, :7] = NEVER
    for name, value in chosen.items():
        row[:, int(name.removeprefix("at"))] = value
    return row


def picture(side: int = 16) -> Tensor:
    torch.manual_seed(0)
    return torch.rand(1, 3, side, side) * 2 - 1


def test_nothing_done_is_the_image_itself_and_told_as_zeros() -> None:
    made, told = Augmentation(0.12)(picture(), draws())
    assert torch.equal(made, picture()) and told.shape == (1, AUGMENTATION_LABELS) and not told.any()


@pytest.mark.parametrize(("chosen", "axis", "label"), [({"at5": ALWAYS}, 3, 0), ({"at0": ALWAYS, "at6": ALWAYS}, 2, 1)])
def test_flips_are_exact_and_told(chosen: dict[str, float], axis: int, label: int) -> None:
    made, told = Augmentation(0.12)(picture(), draws(**chosen))
    assert torch.equal(made, picture().flip(axis))
    assert told[0].tolist() == [float(number == label) for number in range(AUGMENTATION_LABELS)]


def test_a_shift_moves_by_an_eighth_of_the_width() -> None:
    made, told = Augmentation(0.12)(picture(), draws(at4=ALWAYS, at11=1.0))
    torch.testing.assert_close(made[..., 2:], picture()[..., :-2], rtol=0, atol=1e-5)
    assert told[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1.0, 0]


def test_half_a_turn_is_both_flips_and_told_by_its_angle() -> None:
    made, told = Augmentation(0.12)(picture(), draws(at2=ALWAYS, at7=9.0))
    torch.testing.assert_close(made, picture().flip(2, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(told[0, 3:5], torch.tensor([math.cos(math.pi) - 1, 0.0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "wide", "high"), [({"at1": ALWAYS, "at9": 5.0}, 2.0, 2.0), ({"at3": ALWAYS, "at10": 5.0}, 2.0, 0.5)]
)
def test_scale_and_squeeze_are_powers_of_two(chosen: dict[str, float], wide: float, high: float) -> None:
    """Five standard deviations of a fifth of an octave: a bright disc gets twice as wide, or half as high."""
    axis = torch.linspace(-1, 1, 129)
    disc = torch.exp(-24 * (axis[None, :] ** 2 + axis[:, None] ** 2))[None, None]
    made, told = Augmentation(0.12)(disc, draws(**chosen, at8=-9.0))

    def width(profile: Tensor) -> float:
        return float(((profile > 0.5) & (axis.abs() < 0.7)).sum())

    assert width(made[0, 0, 64]) / width(disc[0, 0, 64]) == pytest.approx(wide, rel=0.1)
    assert width(made[0, 0, :, 64]) / width(disc[0, 0, 64]) == pytest.approx(high, rel=0.1)
    assert told.abs().max() == pytest.approx(5.0)


def test_each_image_is_augmented_by_its_own_numbers() -> None:
    torch.manual_seed(1)
    images, numbers = torch.rand(6, 3, 16, 16), torch.randn(6, DRAWS)
    whole = Augmentation(0.5)(images, numbers)
    for row in range(6):
        alone = Augmentation(0.5)(images[row : row + 1], numbers[row : row + 1])
        for ours, theirs in zip(whole, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1], theirs, rtol=0, atol=1e-6)


def test_kinds_come_as_often_as_the_recipe_says_and_flips_every_second_time() -> None:
    torch.manual_seed(2)
    numbers = torch.randn(20_000, DRAWS)
    _, told = Augmentation(0.12)(torch.zeros(20_000, 1, 2, 2), numbers)
    often = (told != 0).float().mean(dim=0)
    expected = [0.5, 0.06, *[0.12] * 7]
    assert often.tolist() == pytest.approx(expected, abs=0.01)


def test_the_network_is_told_and_zeros_are_as_nothing() -> None:
    torch.manual_seed(3)
    network = CascadeUNet(**SMALL_UNET, augmented=True).eval()
    x, t, y = torch.randn(2, 3, 16, 16), torch.rand(2, 1), torch.tensor([0, 1])
    with torch.no_grad():
        network.unet.conv_out.weight.normal_(std=0.1)
        plain = network(x, t, y)
        assert torch.equal(network(x, t, y, augment_BA=torch.zeros(2, AUGMENTATION_LABELS)), plain)
        assert not torch.allclose(network(x, t, y, augment_BA=torch.ones(2, AUGMENTATION_LABELS)), plain)
    assert CascadeUNet(**SMALL_UNET).augment_embedder is None
