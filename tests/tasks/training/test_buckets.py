"""Gradients in buckets: the same means as in one piece, whichever gradients a backward pass makes, and on their way
before it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.training.buckets import Buckets
from tests.helpers.toy_training import start_workers

WIDTH, SMALL = 8, 4 * 8 * 8 + 4 * 8
"""Bytes of one layer of the net: a bucket that holds just one."""


class Net(nn.Module):
    """Three layers; the last in the list comes first in the forward pass, as a head that sits early does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, through: int = 3) -> Tensor:
        early = self.head(x)
        for layer in self.layers[:through]:
            x = layer(x).tanh()
        total: Tensor = (x.square() + early.square()).sum()
        return total


def gradients(net: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def in_one_piece(net: nn.Module, communication: torch.dtype | None) -> list[Tensor]:
    """The plain formula: one message of all gradients."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    sent = torch.cat([each.reshape(-1) for each in found]) / dist.get_world_size()
    sent = sent.to(communication or sent.dtype)
    dist.all_reduce(sent)
    pieces = sent.float().split([each.numel() for each in found])
    return [piece.view_as(each) for piece, each in zip(pieces, found, strict=True)]


def compare(rank: int, world: int, port: int, folder: str, runs: list[Any]) -> None:
    """One gloo worker: every step once in one piece and once in buckets, on the same inputs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    wrong = []
    for communication in (None, torch.bfloat16):
        for accumulation in (1, 3):
            net, twin = Net(), Net()
            buckets = Buckets(list(net.parameters()), communication, SMALL)
            for step in range(3):
                torch.manual_seed(100 * rank + step)
                batches = torch.randn(accumulation, 4, WIDTH)
                through = 3 - step % 2  # the second step leaves the last layer without a gradient
                net.zero_grad(), twin.zero_grad()
                for number, batch in enumerate(batches):
                    if number == accumulation - 1:
                        buckets.begin()
                    net(batch, through).backward()
                    twin(batch, through).backward()
                buckets.finish()
                for name, found, wanted in zip(
                    dict(net.named_parameters()), gradients(net), in_one_piece(twin, communication), strict=True
                ):
                    if found is None or not torch.equal(found, wanted):
                        wrong.append(f"{communication} {accumulation} {step} {name}")
    (Path(folder) / f"{rank}.txt").write_text("\n".join(wrong) or "the same")
    dist.destroy_process_group()


def test_two_workers_average_the_same_in_every_bit(tmp_path: Path) -> None:
    start_workers(2, str(tmp_path), None, compare)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["the same"] * 2


class Wire:
    """Stands for the collectives of two workers with equal gradients, and remembers when each message set out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[int] = []
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "broadcast", lambda tensor, src: None)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)

    def all_reduce(self, tensor: Tensor, async_op: bool) -> Wire:
        assert async_op, "a bucket never holds up the backward pass"
        self.sent.append(tensor.numel())
        tensor.mul_(2)
        return self

    def wait(self) -> None:
        pass


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    yield Wire(monkeypatch)


def step(buckets: Buckets, net: Net, wire: Wire) -> int:
    """Messages that were on their way when the backward pass ended."""
    net.zero_grad()
    wire.sent.clear()
    buckets.begin()
    net(torch.ones(2, WIDTH)).backward()
    early = len(wire.sent)
    buckets.finish()
    return early


def test_gradients_travel_while_backward_runs(wire: Wire) -> None:
    net, twin = Net(), Net()
    buckets = Buckets(list(net.parameters()), None, SMALL)
    assert [len(bucket.parameters) for bucket in buckets.buckets] == [2] * 5, "weight and offset of a layer each"
    assert step(buckets, net, wire) == 0, "of the first step, whose order is not known yet"
    last, used = buckets.order, 4
    assert last is not None
    assert last[-1] == 1, "the layer that no batch uses"
    assert last.index(0) > last.index(2), "the head that sits early is late, and holds up no other"
    assert step(buckets, net, wire) == used
    assert len(wire.sent) == 5, "every bucket once"
    twin(torch.ones(2, WIDTH)).backward()
    for found, wanted in zip(gradients(net), gradients(twin), strict=True):
        assert found is not None
        torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted, rtol=0, atol=0)


def test_only_the_last_backward_pass_of_a_step_sends(wire: Wire) -> None:
    net = Net()
    buckets = Buckets(list(net.parameters()), None, SMALL)
    step(buckets, net, wire)
    wire.sent.clear()
    net(torch.ones(2, WIDTH)).backward()
    assert not wire.sent


def test_a_large_parameter_has_a_bucket_and_half_the_bytes_hold_twice_as_much() -> None:
    parameters = [nn.Parameter(torch.zeros(count)) for count in (10, 2, 30, 2)]
    assert [[p.numel() for p in bucket.parameters] for bucket in Buckets(parameters, None, 48).buckets] == [
        [2],
        [30],
        [2, 10],
    ]
    halves = Buckets(parameters, torch.bfloat16, 80).buckets
    assert [[p.numel() for p in bucket.parameters] for bucket in halves] == [[2, 30, 2], [10]]
