"""Which attention kernels torch takes on a device, decided outside the networks that call it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_HOPPER, _AMPERE = (9, 0), (8, 0)


def preferred_backends(capability: tuple[int, int]) -> list[SDPBackend]:
    """Attention kernels by CUDA compute capability, the fastest first; torch takes the first that fits a call.

    From Hopper on cuDNN's is the fastest for training's and sampling's shapes, and it takes any head width that is a
    multiple of 8 as it is, where FlashAttention 2 pads the 72 of LightningDiT-XL to 96. Both want half precision:
    float32 goes to the memory-efficient kernel.
    """
    exact = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if capability >= _HOPPER:
        return [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *exact]
    if capability >= _AMPERE:
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *exact]
    return exact


@contextmanager
def fastest_attention(device: torch.device) -> Iterator[None]:
    """A stretch in which all threads of this process take the fastest kernels of an NVIDIA device."""
    if device.type != "cuda" or torch.version.cuda is None:
        yield
        return
    with sdpa_kernel(preferred_backends(torch.cuda.get_device_capability(device)), set_priority=True):
        yield
