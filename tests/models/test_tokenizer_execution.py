"""Compile, memory layout and bf16 change how a tokenizer is trained, not what; every term and its balance included."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from models.discriminator import PatchDiscriminator
from models.execution import prepare
from models.tokenizer_losses import TrainableTokenizer
from tests.models.test_autoencoders import small

SIDE = 32


@pytest.fixture
def whole() -> TrainableTokenizer:
    torch.manual_seed(0)
    return TrainableTokenizer(small(in_channels=3, out_channels=3, attention_levels=(1,)), feature_dim=6)


def outcome(module: TrainableTokenizer, adversarial: bool, bf16: bool = False) -> dict[str, Tensor]:
    """Terms and all gradients of a step; beside a discriminator the decoder's graph is asked for gradients twice."""
    torch.manual_seed(1)
    images, cells = torch.rand(2, 3, SIDE, SIDE) * 2 - 1, SIDE // module.model.downscale
    noise, features = torch.randn(2, module.model.embed_dim, cells, cells), torch.randn(2, 6, cells, cells)
    frozen = PatchDiscriminator(width=4, layers=2, norm="group").frozen if adversarial else None
    module.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        terms = module(images, noise, features, frozen)
    terms["total"].backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {name: value.detach().float() for name, value in (terms | gradients).items()}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within a tolerance of its length; keys' offsets have gradients of nothing but rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm().clamp_min(0.1), name


@pytest.mark.parametrize("adversarial", [False, True])
def test_compiled_but_for_the_last_convolutions(
    whole: TrainableTokenizer, adversarial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, names = outcome(whole, adversarial), list(whole.state_dict())
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    prepare(whole.model, compile=True)
    agree(outcome(whole, adversarial), expected, 1e-4)
    assert counters["stats"]["unique_graphs"] == 2, "the encoder's and the decoder's"
    assert list(whole.state_dict()) == names
    twin = copy.deepcopy(whole)
    with torch.no_grad():
        whole.model.decoder.conv_in.weight.zero_()
    agree(outcome(twin, adversarial), expected, 1e-4)


def test_channels_lie_side_by_side_from_end_to_end(whole: TrainableTokenizer) -> None:
    expected = outcome(whole, True)
    seen: list[bool] = []
    for part in (whole.model.encoder, whole.model.decoder):
        part.conv_out.register_forward_pre_hook(
            lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
    outcome(whole, True)
    prepare(whole.model, channels_last=True)
    agree(outcome(whole, True), expected, 1e-4)
    assert seen == [False, False, True, True]
    assert all(parameter.is_contiguous() for parameter in whole.parameters()), "as the optimizer had them"


@pytest.mark.slow  # generates code
def test_all_together_is_close_to_plain_float32(whole: TrainableTokenizer) -> None:
    plain, half = outcome(whole, True), outcome(whole, True, bf16=True)
    torch._dynamo.reset()
    prepare(whole.model, compile=True, channels_last=True)
    found = outcome(whole, True, bf16=True)
    for name in ("reconstruction", "cosine", "image"):
        torch.testing.assert_close(found[name], half[name], rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(found[name], plain[name], rtol=5e-2, atol=5e-2)
