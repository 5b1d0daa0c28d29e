"""Flow maps against a field whose map is known, and the network that begins as the velocity it was given."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.checkpoints import Checkpoint, load_into
from models.clocks import Offsets, SemanticFirst, Synchronous
from models.flops import forward_flops
from models.flow_map import FlowMapDiT, TrainableFlowMap, walk
from models.formats import build, infer_arguments
from models.groups import ChannelGroups
from models.lightningdit import LightningDiT
from models.solvers import everywhere, time_grid
from models.solvers import sample as solve
from tests.models.conftest import PAIR
from tests.models.test_flops import counted

TINY = {"input_size": 4, "in_channels": 6, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
ONE = ChannelGroups(("latent",), (6,))
CLOCKS = [(ONE, Synchronous()), (PAIR, Synchronous(2)), (PAIR, SemanticFirst(0.3))]
MEAN, SPREAD = 0.7, 0.5
"""Of data that is normal in every number: its flow is x_t = t m + sqrt(t² s² + (1 - t)²) z, in closed form."""


def deviation(t: Tensor) -> Tensor:
    return (t.square() * SPREAD**2 + (1 - t).square()).sqrt()


def known_velocity(groups: ChannelGroups) -> Any:
    def velocity(x: Tensor, t_BG: Tensor, y: Tensor) -> Tensor:
        t = groups.spread(t_BG)
        growth = (t * SPREAD**2 - (1 - t)) / deviation(t).square()
        return MEAN + growth * (x - t * MEAN)

    return velocity


class KnownMap(nn.Module):
    """The mean velocity of that flow between any two times."""

    def __init__(self, groups: ChannelGroups) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor, t_BG: Tensor, y: Tensor, until_BG: Tensor) -> Tensor:
        t, until = self.groups.spread(t_BG), self.groups.spread(until_BG)
        end = until * MEAN + (x - t * MEAN) * deviation(until) / deviation(t)
        still = until == t
        return torch.where(still, 0.0, (end - x) / torch.where(still, 1.0, until - t))


@pytest.mark.parametrize(("groups", "clock"), CLOCKS)
def test_one_step_of_a_map_is_two_halves(groups: ChannelGroups, clock: Offsets) -> None:
    """And all are where the flow's own solver ends."""
    noise, y = torch.randn(7, 6, 2, 2, dtype=torch.float64), torch.zeros(7, dtype=torch.long)
    ways = [walk(KnownMap(groups), noise, y, clock=clock, groups=groups, evaluations=n) for n in (1, 2, 4, 8)]
    for one, halves in pairwise(ways):
        torch.testing.assert_close(one, halves, rtol=1e-6, atol=1e-6)
    solved = solve(known_velocity(groups), noise, y, clock=clock, groups=groups, solver="unipc", steps=520)
    torch.testing.assert_close(ways[0], solved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("groups", "clock"), CLOCKS)
def test_the_loss_is_nothing_for_the_map_and_not_for_the_velocity(groups: ChannelGroups, clock: Offsets) -> None:
    torch.manual_seed(0)
    noise, y = torch.randn(64, 6, 2, 2), torch.zeros(64, dtype=torch.long)
    points = [noise]
    solve(known_velocity(groups), noise, y, clock=clock, groups=groups, solver="unipc", steps=520, seen=points.append)
    grid = time_grid(520, clock.span)
    for start, end in ((0, 260), (130, 260), (0, 520)):
        t, until = (everywhere(clock.at(grid[each])[0], noise) for each in (start, end))
        step = {"x_BCHW": points[start], "t_BG": t, "until_BG": until, "y_B": y, "end_BCHW": points[end]}
        found = TrainableFlowMap(KnownMap(groups), groups)(**step)
        assert found["total"] < 1e-6
        assert found[f"by_time/{groups.names[0]}"].shape == (2, 64)

        def straight(x: Tensor, t: Tensor, y: Tensor, until: Tensor) -> Tensor:
            return known_velocity(groups)(x, t, y)

        assert TrainableFlowMap(straight, groups)(**step)["total"] > 1e-4  # type: ignore[arg-type]


def random_network(groups: ChannelGroups, **more: Any) -> LightningDiT:
    torch.manual_seed(1)
    network = LightningDiT(**TINY, groups=groups, **more)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network.eval()


@pytest.mark.parametrize("groups", [ONE, PAIR])
def test_given_weights_begin_as_their_own_velocity(groups: ChannelGroups) -> None:
    plain, mapped = random_network(groups), FlowMapDiT(**TINY, groups=groups).eval()
    load_into(mapped, Checkpoint("lightningdit", plain.state_dict()), "given")
    x, y = torch.randn(3, 6, 4, 4), torch.tensor([0, 4, 5])
    t = torch.rand(3, len(groups))
    with torch.no_grad():
        assert torch.equal(mapped(x, t, y), plain(x, t, y))
        assert torch.equal(mapped(x, t, y, torch.ones_like(t)), plain(x, t, y))
        mapped.step_embedders[0].mlp[2].weight.normal_()  # type: ignore[index,union-attr,operator]
        assert not torch.equal(mapped(x, t, y, torch.ones_like(t)), mapped(x, t, y))


def test_flops_are_what_torch_counts_and_stored_arguments_build_it() -> None:
    groups = {"names": list(PAIR.names), "sizes": list(PAIR.sizes)}
    with torch.device("meta"):
        network = build("lightningdit", json.loads(json.dumps(TINY | {"groups": groups, "flow_map": True})))
        x, t = torch.rand(1, 6, 4, 4), torch.rand(1, 2)
        y = torch.zeros(1, dtype=torch.long)
        assert isinstance(network, FlowMapDiT)
        assert forward_flops(network) == counted(lambda: network(x, t, y, t))


def test_a_map_is_known_by_its_tensors() -> None:
    with torch.device("meta"):
        tensors = FlowMapDiT(**TINY).state_dict()
        kind, arguments = infer_arguments(tensors)
        assert build(kind, arguments).state_dict().keys() == tensors.keys()
