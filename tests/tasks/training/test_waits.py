"""The guard's verdict stays on the device: the host does not wait for it in a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tasks.training.optimizer import GuardedAdamW
from tests.helpers.waits import DEVICES, no_waits


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_is_judged_clipped_and_scaled(device: str, scaled: bool) -> None:
    network = nn.Linear(4, 4, device=device)
    optimizer = GuardedAdamW(network.parameters(), limit=50.0, clip_norm=1.0, sharded=False, scaled=scaled, lr=1e-3)
    for _ in range(2):
        with no_waits(device), torch.no_grad():
            gradients = [torch.ones_like(parameter) for parameter in network.parameters()]
            optimizer.expect(torch.ones((), device=device))
            optimizer._judge(gradients)  # torch's own step after it knows no device without a kernel
            optimizer.settle()
    assert optimizer.norm.device.type == optimizer.event.device.type == device
