"""Layers by their dimensions: what they hold and what they compute."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What one part of a network costs."""

    values: int = 0
    """Numbers in its state dict: parameters and buffers."""
    tensors: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.values + other.values, self.tensors + other.tensors, self.flops + other.flops)

    def times(self, count: int) -> Cost:
        return Cost(count * self.values, count * self.tensors, count * self.flops)


def resolution(inward: int, width: int, blocks: int, attends: bool, cells: int) -> list[Cost]:
    residuals = [residual(inward if number == 0 else width, width, cells) for number in range(blocks)]
    return [*residuals, *([self_attention(width, cells)] * (blocks if attends else 0))]


def bottleneck(width: int, cells: int, attends: bool = True) -> list[Cost]:
    return [residual(width, width, cells).times(2), *([self_attention(width, cells)] if attends else [])]


def residual(inward: int, outward: int, cells: int) -> Cost:
    body = [layer_norm(inward), convolution(inward, outward, 3, cells)]
    body += [layer_norm(outward), convolution(outward, outward, 3, cells)]
    return total(body) + (convolution(inward, outward, 1, cells) if inward != outward else Cost())


def told_residual(inward: int, outward: int, told: int, cells: int) -> Cost:
    """A residual block of a UNet, which an embedding of width `told` is added to."""
    return residual(inward, outward, cells) + linear(told, outward)


def self_attention(width: int, cells: int) -> Cost:
    return layer_norm(width) + convolution(width, width, 1, cells).times(4) + attention(cells, width)


def linear(inward: int, outward: int, rows: int = 1) -> Cost:
    return Cost(inward * outward + outward, 2, 2 * rows * inward * outward)


def convolution(inward: int, outward: int, kernel: int, cells: int, bias: bool = True) -> Cost:
    """cells: of its output."""
    weights = inward * outward * kernel**2
    return Cost(weights + bias * outward, 1 + bias, 2 * cells * weights)


def attention(tokens: int, width: int) -> Cost:
    return Cost(flops=4 * tokens**2 * width)


def layer_norm(width: int) -> Cost:
    return Cost(2 * width, 2)


def batch_norm(width: int) -> Cost:
    """Weight, bias, running mean and variance, and a counter."""
    return Cost(4 * width + 1, 5)


def table(values: int) -> Cost:
    return Cost(values, 1)


def total(parts: Iterable[Cost]) -> Cost:
    return sum(parts, Cost())
