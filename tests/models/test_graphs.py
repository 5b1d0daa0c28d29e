"""Any number of models, resolutions and kinds of batch is compiled in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from models.cascade_dit import CascadeDiT
from models.execution import prepare
from tests.models.conftest import small_batch, small_dit, stirred

SIDES = (2, 4, 8)
MORE_THAN_ONE_CODE_OBJECT_MAY_HAVE = torch._dynamo.config.recompile_limit + 1


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what makes graphs: that they are differentiated and turned into code is the matter of test_execution."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def made() -> int:
    return counters["stats"]["unique_graphs"]


def cascade() -> CascadeDiT:
    network = CascadeDiT(resolutions=SIDES, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    return stirred(network)  # type: ignore[return-value]


def train(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        v = model.train()(x, torch.full((len(x), 1), 0.5), torch.zeros(len(x), dtype=torch.long))
    v.float().square().sum().backward()
    return v.detach()


def validate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return train_free(model, x)


def preview(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return train_free(model, x[:2])


def train_free(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x, torch.full((len(x), 1), 0.5), torch.zeros(len(x), dtype=torch.long))


def test_all_resolutions_and_kinds_of_batch_of_a_cascade_and_none_twice() -> None:
    model = cascade()
    plain = copy.deepcopy(model)
    prepare(model, compile=True)
    kinds: list[Callable[[nn.Module, Tensor], Tensor]] = [train, validate, preview]
    batches = [torch.randn(3, 2, side, side) for side in SIDES]
    for _ in range(2):
        for x in batches:
            for kind in kinds:
                torch.testing.assert_close(kind(model, x), kind(plain, x), rtol=2e-2, atol=2e-2)
    assert made() == len(kinds) * len(SIDES) >= MORE_THAN_ONE_CODE_OBJECT_MAY_HAVE


def test_many_networks_one_after_the_other() -> None:
    x, t, y = small_batch()
    for number in range(MORE_THAN_ONE_CODE_OBJECT_MAY_HAVE):
        network = small_dit(depth=1, hidden_size=8 * (1 + number), num_heads=1)
        model = prepare(network, compile=True)
        with torch.no_grad():
            model(x, t, y)
    assert made() == MORE_THAN_ONE_CODE_OBJECT_MAY_HAVE


def test_many_models_that_are_compiled_whole() -> None:
    """They share what torch itself would count by: the call of any module."""
    for number in range(MORE_THAN_ONE_CODE_OBJECT_MAY_HAVE):
        model, x = nn.Sequential(nn.Linear(1 + number, 2), nn.GELU()), torch.randn(3, 1 + number)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(prepare(model, compile=True)(x), expected)
    assert made() == MORE_THAN_ONE_CODE_OBJECT_MAY_HAVE


def test_it_is_said_what_one_waits_for() -> None:
    said: list[str] = []
    model = prepare(small_dit(), compile=True, tell=said.append)
    for _ in range(2):
        with torch.no_grad():
            model(*small_batch())
    assert len(said) == 2, "once for both blocks and both calls"
    assert said[0].startswith("compiling Block for 3 × 16 × 32 float32, 3 × 32 float32: the first call waits")
    assert said[1].startswith("compiled Block for 3 × 16 × 32") and said[1].endswith(" s")
