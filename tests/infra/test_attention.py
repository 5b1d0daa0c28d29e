"""Which attention kernels are taken on which card; the choice itself needs none."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from infra.attention import fastest_attention, preferred_backends
from infra.device import computing

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EXACT = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BY_CARD = {
    "V100": ((7, 0), EXACT),
    "A100": ((8, 0), [FLASH, CUDNN, *EXACT]),
    "L4": ((8, 9), [FLASH, CUDNN, *EXACT]),
    "H100": ((9, 0), [CUDNN, FLASH, *EXACT]),
    "B200": ((10, 0), [CUDNN, FLASH, *EXACT]),
}


def taken() -> list[SDPBackend]:
    return _cur_sdpa_kernel_backends(with_priority=True)


@pytest.mark.parametrize("card", BY_CARD)
def test_by_card_and_only_while_asked(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, expected = BY_CARD[card]
    assert preferred_backends(capability) == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    before = taken()
    with fastest_attention(torch.device("cuda")):
        assert taken() == expected
    assert taken() == before


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda")])
def test_elsewhere_torch_decides(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)  # as on AMD's cards, which torch calls cuda too
    before = taken()
    with fastest_attention(device):
        assert taken() == before


def test_stages_compute_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with computing("tf32", torch.device("cuda")):
        assert taken()[0] == CUDNN
