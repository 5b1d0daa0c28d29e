"""Compile, bf16 autocast and activation checkpointing change how, not what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.autoencoder import Identity
from models.clocks import SemanticFirst
from models.execution import halve, prepare
from models.foundation import FoundationModel
from models.objectives import TrainableVelocity, VelocityMatching
from models.semantic_vae import SemanticVAE
from tests.models.conftest import PAIR, small_batch, small_dit
from tests.models.test_autoencoders import small
from tests.models.test_objectives import batch as training_batch
from tests.models.test_objectives import objective

SWITCHES = {
    "sfd": {},
    "noshift_patch2": {"shift": False, "patch_size": 2, "groups": None, "align_depth": None, "align_dim": None},
    "value_residual": {"value_residual": True},
    "plain_dit": {
        "qk_norm": False,
        "swiglu": False,
        "rope": False,
        "rmsnorm": False,
        "learn_sigma": True,
        "groups": None,
        "align_depth": None,
        "align_dim": None,
    },
}


def outputs(model: nn.Module, bf16: bool = False) -> dict[str, Tensor]:
    """Velocity, projection where there is one, and all gradients of a scalar of both."""
    x, t, y = small_batch()
    two_clocks = getattr(model, "repa_projector", None) is not None
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if two_clocks:
            velocity, projection = model(x, t, y, with_alignment=True)
        else:
            velocity, projection = model(x, t[:, :1], y), torch.zeros(1)
    (velocity.float().square().mean() + projection.float().square().mean()).backward()
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach().float(), "projection": projection.detach().float(), **gradients}


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within a tolerance of its largest value."""
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        deviation = (found[name] - value).norm() / value.norm().clamp_min(1e-6)
        assert deviation <= tolerance, f"{name}: relative deviation {deviation:.1e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("switches", SWITCHES)
def test_activation_checkpointing_gives_the_same_bits(switches: str) -> None:
    model = small_dit(**SWITCHES[switches])
    names = list(model.state_dict())
    expected = outputs(copy.deepcopy(model))
    recomputing = prepare(model, checkpoint_activations=True)
    assert list(recomputing.state_dict()) == names
    agree(outputs(recomputing), expected, 0.0)


def test_activation_checkpointing_recomputes() -> None:
    model = small_dit()
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    outputs(prepare(model, checkpoint_activations=True))
    assert len(calls) == 2
    with pytest.raises(ValueError, match="nothing to checkpoint"):
        prepare(SemanticVAE(feature_dim=4, width=8, num_heads=2), checkpoint_activations=True)


@pytest.mark.parametrize("compile", [False, True])
def test_a_prepared_model_can_be_copied(compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy's blocks must be its own."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = prepare(small_dit(), compile=compile, checkpoint_activations=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert outputs(twin)["velocity"].abs().sum() > 0
    assert outputs(model)["velocity"].abs().sum() == 0


@pytest.mark.parametrize("switches", SWITCHES)
def test_bf16_autocast_is_close(switches: str) -> None:
    model = small_dit(**SWITCHES[switches])
    agree(outputs(model, bf16=True), outputs(copy.deepcopy(model)), 3e-2)


@pytest.mark.parametrize("switches", SWITCHES)
def test_one_graph_without_breaks(switches: str) -> None:
    """fullgraph=True through the tracer and autograd, without the slow code generator."""
    model = small_dit(**({"depth": 1} | SWITCHES[switches]))
    expected = outputs(copy.deepcopy(model))
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    agree(outputs(model), expected, 1e-5)


@pytest.mark.slow  # generates code; one graph without breaks is shown above
def test_compiled_agrees_and_one_graph_serves_all_blocks() -> None:
    """More blocks than the compiler would make graphs for (its limit is 8)."""
    model = small_dit(depth=10)
    expected, names = outputs(copy.deepcopy(model)), list(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    compiled = prepare(model, compile=True)
    agree(outputs(compiled), expected, 1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert list(compiled.state_dict()) == names


def test_a_model_without_blocks_is_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    features = torch.randn(2, 4)
    expected = model(features)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.testing.assert_close(prepare(model, compile=True)(features), expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_one_graph_serves_all_blocks_of_a_semantic_vae(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Whichever side of it is called, as `encode` calls one alone; gradients agree."""
    torch.manual_seed(0)
    model = SemanticVAE(feature_dim=4, width=8, depth=3, num_heads=2).train(training)
    plain, features = copy.deepcopy(model), torch.randn(2, 4, 2, 2)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    prepare(model, compile=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    for each in (model, plain):
        with torch.set_grad_enabled(training):
            found, posterior, _ = each(features)
        if training:
            (found.square().mean() + posterior.mean.square().mean()).backward()
    torch.testing.assert_close(model(features)[0], plain(features)[0])
    if training:
        for one, two in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad)
    else:
        with torch.no_grad():
            torch.testing.assert_close(model.encode(features).mean, plain.encode(features).mean)
    assert counters["stats"]["unique_graphs"] == 1 + (not training), "with gradients and without are two"


def test_one_graph_serves_all_blocks_of_a_foundation_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled whole, its dozens of blocks would be compiled one by one."""
    model = FoundationModel("vit_tiny_patch16_224", input_size=32)
    (given,) = images()
    expected = model(given)
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert torch.equal(prepare(model, compile=True)(given), expected)
    assert counters["stats"]["unique_graphs"] == 1 and len(model.network.blocks) == 12


def test_pixels_have_no_autoencoder_to_compile() -> None:
    model = prepare(Identity(), compile=True, channels_last=True)
    (given,) = images()
    assert torch.equal(model.encode(given).mean, given)  # type: ignore[operator]


def images() -> tuple[Tensor]:
    return (torch.randn(2, 3, 32, 32),)


FROZEN: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "a diffusion transformer": lambda: (small_dit(qk_norm=True), small_batch()),
    "a tokenizer": lambda: (small(in_channels=3, out_channels=3, attention_levels=(1,)), images()),
    "a foundation model": lambda: (FoundationModel("vit_tiny_patch16_224", input_size=32), images()),
}


@pytest.mark.parametrize("kind", FROZEN)
@torch.no_grad()
def test_halved_weights_give_the_same_bits_under_autocast(kind: str) -> None:
    """Products' weights take half the memory, and nobody copies them in every pass."""
    model, given = FROZEN[kind]()
    model.requires_grad_(False).eval()

    def result() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(*given)
        return found[0] if isinstance(found, tuple) else found

    expected = result()
    halve(model, torch.bfloat16)
    assert torch.equal(result(), expected)
    halved = {type(m) for m in model.modules() for p in m.parameters(recurse=False) if p.dtype == torch.bfloat16}
    assert halved and halved <= {nn.Linear, nn.Conv2d}


def test_weights_that_are_trained_are_not_halved() -> None:
    with pytest.raises(ValueError, match="weights to train"):
        halve(small_dit(), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switches", "checkpoint_activations", "bf16"),
    [("noshift_patch2", False, False), ("plain_dit", False, False), ("sfd", True, False), ("sfd", False, True)],
)
def test_every_switch_compiles(switches: str, checkpoint_activations: bool, bf16: bool) -> None:
    model = small_dit(**({"depth": 1} | SWITCHES[switches]))
    expected = outputs(copy.deepcopy(model))
    torch._dynamo.reset()
    compiled = prepare(model, compile=True, checkpoint_activations=checkpoint_activations)
    agree(outputs(compiled, bf16=bf16), expected, 3e-2 if bf16 else 1e-4)


def test_a_whole_training_step_is_one_graph() -> None:
    """The objective compiles with the network, so an engine may wrap and compile both."""
    step = TrainableVelocity(small_dit(depth=1), objective())
    data = training_batch()
    expected = step(**data)["total"].item()
    torch._dynamo.reset()
    step.compile(fullgraph=True, backend="aot_eager")
    assert step(**data)["total"].item() == pytest.approx(expected, rel=1e-5)
    assert isinstance(step.objective, VelocityMatching)
    assert step.objective.clock == SemanticFirst(0.3) and step.objective.groups == PAIR
