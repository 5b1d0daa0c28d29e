"""The perceptual term on a foundation model: its value by hand, where its gradients go, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.foundation import FoundationModel
from models.perceptual import FeatureDistance


@pytest.fixture(scope="module")
def network() -> FoundationModel:
    torch.manual_seed(0)
    return FoundationModel("efficientnet_lite0", input_size=32, layer=3)


def test_it_is_the_squared_distance_of_unit_features_of_every_layer(network: FoundationModel) -> None:
    real, other = torch.randn(2, 3, 3, 32, 32).unbind()
    found = FeatureDistance(network, (1, 0))(real, other)
    by_hand = torch.zeros(3)
    for one, two in zip(network.levels(real, [0, 1]), network.levels(other, [0, 1]), strict=True):
        cosines = torch.nn.functional.cosine_similarity(one, two, dim=1)
        by_hand += (2 - 2 * cosines).mean(dim=(1, 2))
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    assert found.min() > 0 and FeatureDistance(network, (0, 1))(real, real).abs().max() == 0


def test_gradients_reach_what_was_made_and_nothing_else(network: FoundationModel) -> None:
    real, made = (torch.randn(1, 3, 32, 32, requires_grad=True) for _ in range(2))
    FeatureDistance(network, (0, 2))(real, made).sum().backward()
    assert made.grad is not None and made.grad.abs().max() > 0
    assert real.grad is None and all(each.grad is None for each in network.parameters())
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)  # where features may be all alike, or nothing
    FeatureDistance(network, (0, 2))(real, flat).sum().backward()
    assert isinstance(flat.grad, Tensor) and flat.grad.isfinite().all()


def test_a_layer_counted_from_the_last_is_that_layer(network: FoundationModel) -> None:
    images = torch.randn(2, 3, 32, 32)
    every = network.levels(images, [0, 1, 2, 3, 4])
    found = FeatureDistance(network, (4, 2)).look(images, -1, -4)
    for features, layer in zip(found, (2, 4, 4, 1), strict=True):
        torch.testing.assert_close(features, every[layer])


def test_layers_that_are_not_there_are_refused(network: FoundationModel) -> None:
    with pytest.raises(ValueError, match=r"\[2, 9\] are not all among the 5"):
        FeatureDistance(network, (2, 9))
