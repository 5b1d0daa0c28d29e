"""Recorded passes: the bookkeeping on a CPU, with a recorder that replays by running again; CUDA's own where it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from models.captured import Captured, Pass
from models.clocks import SemanticFirst
from models.guidance import ClassifierFree
from models.solvers import sample
from tests.models.conftest import PAIR, small_batch, small_dit


class Recorder:
    """A graph's behaviour: it reads its own buffers and answers in one piece of memory, over and over."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, network: nn.Module, given: tuple[Tensor | None, ...]) -> Pass:
        self.recorded += 1
        buffers = [None if x is None else x.clone() for x in given]
        result = network(*buffers)

        def replay(*given: Tensor | None) -> Tensor:
            for buffer, value in zip(buffers, given, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            result.copy_(network(*buffers))
            return result.clone()

        return replay


@torch.no_grad()
def test_a_guided_sample_is_the_same_in_every_bit_and_a_kind_is_recorded_once() -> None:
    network, (x, _, y) = small_dit(), small_batch()
    run = partial(sample, clock=SemanticFirst(0.3), groups=PAIR, steps=3)
    guidance = ClassifierFree(2.0, 5, groups=PAIR)
    recorder = Recorder()
    captured = Captured(network, record=recorder)
    assert torch.equal(run(guidance(captured), x, y), run(guidance(network), x, y))
    assert recorder.recorded == 1, "the guide's pass is of the same kind"
    run(guidance(captured), x[:2], y[:2])
    with torch.autocast("cpu", torch.bfloat16):
        run(guidance(captured), x, y)
    assert recorder.recorded == 3, "another batch, another precision"


@torch.no_grad()
def test_results_do_not_share_memory() -> None:
    captured, (x, t, y) = Captured(small_dit(), record=Recorder()), small_batch()
    first = captured(x, t, y)
    kept = first.clone()
    assert not torch.equal(captured(2 * x, t, y), first) and torch.equal(first, kept)


@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once() -> None:
    said: list[str] = []

    def refuse(_network: nn.Module, _given: tuple[Tensor | None, ...]) -> Pass:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    network, batch = small_dit(), small_batch()
    captured = Captured(network, said.append, refuse)
    for _ in range(2):
        assert torch.equal(captured(*batch), network(*batch))
    assert said == [
        "no CUDA graph of LightningDiT, which runs as it is: operation not permitted when stream is capturing"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
@torch.no_grad()
def test_cuda_replays_what_the_network_computes() -> None:
    network = small_dit().cuda()
    batch = [each.cuda() for each in small_batch()]
    said: list[str] = []
    captured = Captured(network, said.append)
    for factor in (1.0, 2.0):
        given = (factor * batch[0], *batch[1:])
        torch.testing.assert_close(captured(*given), network(*given))
    assert not said
