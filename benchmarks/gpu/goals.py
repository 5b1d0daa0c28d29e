"""The figures of the sheet: what should be reached on one H100, and what is expected by reading the code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One figure. `name` is that of its record: `section/what`."""

    name: str
    what: str
    unit: str
    floor: float | None = None
    goal: float | None = None
    expected: str = ""
    """By reading the code, before anything was measured."""


GOALS = (
    Goal("environment/bf16", "product of 8192³ in bfloat16", "TFLOP/s", expected="790"),
    Goal("environment/tf32", "product of 4096³ in TF32", "TFLOP/s", expected="300 to 400"),
    Goal("environment/fp32", "product of 4096³ in float32", "TFLOP/s", expected="50"),
    Goal("environment/attention", "attention of head width 72, forward and backward", "TFLOP/s"),
    Goal("golden/fp32", "golden tensors in float32, worst over tolerance", "×", expected="below 1"),
    Goal("golden/tf32", "the same in TF32", "×", expected="above 1"),
    Goal("training/xl", "LightningDiT-XL/1, a training step", "images/s", 400, 550, "480 to 560"),
    Goal("training/xl_mfu", "the same, share of the peak", "%", 29, 40, "35 to 40"),
    Goal("training/xl_eager", "the same, not compiled, batch 32", "images/s", expected="230 to 320"),
    Goal("training/xl_memory", "the same compiled, memory at most", "GB", expected="52: 13.5, and 0.3 an image, in"),
    Goal("training/xl_waits", "places where the host waits in a step", "", expected="0"),
    Goal("training/against_plain", "against a plain compiled loop in bfloat16", "×", 0.9, 1.0),
    Goal("training/sfd", "SFD-XL with targets made online", "images/s", 380, 500),
    Goal("training/b", "LightningDiT-B/1", "images/s", 1800, 2300),
    Goal("sampling/fp32", "a pass of XL in float32", "TFLOP/s", expected="50"),
    Goal("sampling/bf16_compiled", "a pass of XL in bfloat16, compiled", "TFLOP/s", expected="500"),
    Goal("sampling/speedup", "guided sampling against float32", "×", 5, 10, "9 to 11"),
    Goal("encoding/views", "encode, both views, VA-VAE and DINOv2-B", "images/s", 150, 300),
    Goal("encoding/tokenizer", "a step of the published VA-VAE", "images/s", None, 60, "6 to 58 by public reports"),
    Goal("stability/finite", "B/1 in bfloat16 through the whole loop, bad steps", "", expected="0"),
    Goal("stability/loop", "the same", "images/s", 1800, 2300),
    Goal("stability/twice", "largest gap of weights of two equal runs", "", expected="not 0"),
    Goal("stability/twice_deterministic", "the same, deterministic", "", expected="0"),
    Goal("stability/price", "deterministic against not", "×"),
    Goal("start/first_step", "XL built again up to its first step, caches warm", "s", 60, 20),
)
"""Rows of the sheet, in order. Floors and goals are of one H100 at batch 128 unless the row says otherwise."""
