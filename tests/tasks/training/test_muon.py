"""Muon beside AdamW: its step against torch's own, the guard's verdict, and the laws of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.training import Training
from models.lightningdit import LightningDiT
from tasks.training.muon import GuardedMuon, matrices, orthogonal
from tests.helpers.toy_training import BATCH, Run, Toy, ToyTrainee, near, result, same, train

MUON: dict[str, Any] = {"optimizer": "muon", "clip_norm": 1.0}


class Blocks(Toy):
    """The toy, its second layer a block's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("first", nn.Linear(6, 16))
        self.net.add_module("blocks", nn.Sequential(nn.GELU(), nn.Linear(16, 16)))
        self.net.add_module("last", nn.Linear(16, 6))


class BlocksTrainee(ToyTrainee):
    def __init__(self, section: Training, run: Run) -> None:
        super().__init__(section, run)
        torch.manual_seed(section.seed)
        self.module = self.network = Blocks()


def run(name: str, place: str = "", **options: Any) -> Run:
    return Run(name, place or name, section=MUON, trainee=BlocksTrainee, **options)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    broken = frozenset({6 * BATCH + 3})
    train(
        1,
        folder,
        [
            run("whole"),
            run("stopped", "resumed", stop_at=7 * BATCH),
            run("resumed"),
            run("micro", compute={"micro_batch": 4}),
            run("skip", broken=broken),
            run("zero", compute={"engine": "deepspeed", "zero_stage": 1}),
            Run("no blocks", "no blocks", section=MUON),
        ],
    )
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    layouts = {"plain": {"engine": "plain"}, "zero0": {"engine": "deepspeed", "zero_stage": 0}}
    train(2, folder, [run(name, compute=layout) for name, layout in layouts.items()])
    return folder


def test_it_learns_resumes_in_every_bit_and_knows_no_layout(one: Path, two: Path) -> None:
    whole = result(one, "whole")
    assert whole["curve"][-1, 1] < 0.8 * whole["curve"][0, 1]
    assert same(result(one, "resumed"), whole)
    near(result(one, "micro"), whole)
    for name in ("plain", "zero0"):
        near(result(two, name), whole | {"curve": result(two, name)["curve"]})


def test_a_bad_batch_changes_no_weight_and_no_momentum(one: Path) -> None:
    assert all(value.isfinite().all() for name, value in result(one, "skip").items() if name != "curve")


def test_what_it_cannot_step_is_refused(one: Path) -> None:
    assert "zero_stage 1" in (one / "zero.error").read_text()
    assert "no `blocks` with matrices" in (one / "no blocks.error").read_text()


def guarded(weight: nn.Parameter, pieces: int = 1, **options: Any) -> GuardedMuon:
    settings: dict[str, Any] = {"limit": None, "clip_norm": None, "sharded": False, "lr": 0.01, "weight_decay": 0.1}
    optimizer = GuardedMuon([weight], matrices={weight: pieces}, **(settings | options))
    optimizer.allocate()
    optimizer.armed = True
    return optimizer


def step(optimizer: GuardedMuon, weight: nn.Parameter, gradient: torch.Tensor) -> None:
    optimizer.expect(torch.ones(()))
    weight.grad = gradient.clone()
    optimizer.step()
    optimizer.settle()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)])
def test_steps_are_those_of_torchs_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(shape))
    theirs.data.copy_(ours.data)
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizer = guarded(ours)
    for _ in range(5):
        gradient = torch.randn(shape)
        step(optimizer, ours, gradient)
        theirs.grad = gradient.clone()
        other.step()
    # Theirs iterates in bfloat16 on a CPU, too.
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-2)
    assert float(optimizer.steps) == 5


def test_singular_values_end_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(32, 20)))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_joined_matrices_are_made_orthogonal_each_alone() -> None:
    torch.manual_seed(0)
    joined, gradient = nn.Parameter(torch.zeros(12, 4)), torch.randn(12, 4)
    step(guarded(joined, 3, weight_decay=0.0), joined, gradient)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = nn.Parameter(torch.zeros(4, 4))
        step(guarded(alone, weight_decay=0.0), alone, gradient[rows])
        torch.testing.assert_close(joined[rows], alone)


def test_a_clipped_gradient_gives_the_same_first_step_and_a_broken_one_none() -> None:
    """The first direction knows no length, the momentum behind it does."""
    torch.manual_seed(0)
    gradient = torch.randn(6, 4)
    plain, clipped = (nn.Parameter(torch.zeros(6, 4)) for _ in range(2))
    free, bound = guarded(plain), guarded(clipped, clip_norm=0.5)
    step(free, plain, gradient)
    step(bound, clipped, gradient)
    torch.testing.assert_close(plain, clipped, atol=1e-6, rtol=1e-4)
    norm = float(gradient.norm())
    torch.testing.assert_close(bound.state[clipped]["exp_avg"] * norm / 0.5, free.state[plain]["exp_avg"])
    before = plain.detach().clone(), free.state[plain]["exp_avg"].clone()
    step(free, plain, torch.full((6, 4), torch.nan))
    assert torch.equal(plain, before[0]) and torch.equal(free.state[plain]["exp_avg"], before[1])
    assert float(free.bad) == 1 and float(free.steps) == 1


def test_of_a_transformer_it_takes_the_matrices_of_blocks() -> None:
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "in_channels": 4, "input_size": 4}
    model = LightningDiT(**sizes)
    taken = matrices(model.named_parameters())
    names = {name: taken[p] for name, p in model.named_parameters() if p in taken}
    assert names == {
        f"blocks.{block}.{name}": pieces
        for block in range(2)
        for name, pieces in {
            "attn.qkv.weight": 3,
            "attn.proj.weight": 1,
            "mlp.w12.weight": 2,
            "mlp.w3.weight": 1,
        }.items()
    }
