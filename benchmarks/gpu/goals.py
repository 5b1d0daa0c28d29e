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
    Goal("environment/memory", "copies of a gigabyte, read and written", "TB/s", expected="2.5 to 3"),
    Goal("environment/attention", "attention of head width 72, forward and backward", "TFLOP/s"),
    Goal("golden/fp32", "golden tensors in float32, worst over tolerance", "×", expected="below 1"),
    Goal("golden/tf32", "the same in TF32", "×", expected="above 1"),
    Goal("golden/bf16", "the same in bfloat16", "×", expected="far above 1"),
    Goal("training/xl", "LightningDiT-XL/1, a training step", "images/s", 400, 550, "480 to 560"),
    Goal("training/xl_mfu", "the same, share of the peak", "%", 29, 40, "35 to 40"),
    Goal("training/xl_memory", "the same, memory at most", "GB", expected="52: 13.5, and 0.3 an image, in"),
    Goal("training/xl_waits", "the same, places where the host waits", "", expected="0"),
    Goal("training/xl_32", "the same, batch 32", "images/s", expected="400 to 470"),
    Goal("training/xl_eager", "the same, batch 32, not compiled", "images/s", expected="230 to 320"),
    Goal("training/accumulated", "the same, four micro-batches of 32", "images/s"),
    Goal("training/recomputed", "the same, activations computed again", "images/s"),
    Goal("training/against_plain", "against a plain compiled loop in bfloat16", "×", 0.9, 1.0),
    Goal("training/half_stream_gain", "with tokens in bfloat16, against as it is", "×", expected="1.05 to 1.12"),
    Goal("training/sfd", "SFD-XL with targets made online", "images/s", 380, 500),
    Goal("training/b", "LightningDiT-B/1", "images/s", 1800, 2300),
    Goal("sampling/fp32", "a pass of XL in float32", "TFLOP/s", expected="50"),
    Goal("sampling/tf32", "a pass of XL in TF32", "TFLOP/s", expected="300"),
    Goal("sampling/bf16", "a pass of XL in bfloat16", "TFLOP/s"),
    Goal("sampling/bf16_compiled", "a pass of XL in bfloat16, compiled", "TFLOP/s", expected="500"),
    Goal("sampling/bf16_captured", "the same as a CUDA graph", "TFLOP/s"),
    Goal("sampling/captured_gain", "a CUDA graph of 8 images against compiled", "×"),
    Goal("sampling/speedup", "guided sampling against float32", "×", 5, 10, "9 to 11"),
    Goal("sampling/waits", "places where the host waits in a guided sample", "", expected="0"),
    Goal("start/first_step", "XL in a new process up to its first step, caches warm", "s", 60, 20),
    Goal("stability/finite", "B/1 in bfloat16 through the whole loop, bad steps", "", expected="0"),
    Goal("stability/loop", "the same", "images/s", 1800, 2300),
    Goal("stability/wait", "the same, share of time that it waits for data", "%", expected="below 3"),
    Goal("stability/twice", "largest gap of weights of two equal runs", "", expected="not 0"),
    Goal("stability/resumed", "of a run and one that was killed and resumed", "", expected="not 0"),
    Goal("stability/twice_deterministic", "two equal runs, deterministic", "", expected="0"),
    Goal("stability/resumed_deterministic", "killed and resumed, deterministic", "", expected="0"),
    Goal("stability/price", "deterministic against not, time", "×"),
    Goal("stability/checkpoint", "a checkpoint of XL holds the step", "s", expected="3 to 5"),
    Goal("loading/lightningdit", "latents into the GPU as LightningDiT is fed", "images/s", expected="8,700 a core"),
    Goal("loading/sfd", "latents and stored targets as SFD is fed", "images/s", expected="4,500 a core"),
    Goal("encoding/encoder_fp32", "VA-VAE's encoder in float32", "images/s"),
    Goal("encoding/encoder_tf32", "the same in TF32", "images/s"),
    Goal("encoding/encoder_bf16", "the same in bfloat16", "images/s"),
    Goal("encoding/encoder_bf16_compiled", "the same in bfloat16, compiled", "images/s"),
    Goal("encoding/decoder_fp32", "VA-VAE's decoder in float32", "images/s"),
    Goal("encoding/decoder_tf32", "the same in TF32", "images/s"),
    Goal("encoding/decoder_bf16", "the same in bfloat16", "images/s"),
    Goal("encoding/decoder_bf16_compiled", "the same in bfloat16, compiled", "images/s"),
    Goal("encoding/foundation_fp32", "DINOv2-B in float32", "images/s"),
    Goal("encoding/foundation_tf32", "the same in TF32", "images/s"),
    Goal("encoding/foundation_bf16", "the same in bfloat16", "images/s"),
    Goal("encoding/views", "encode, both views, VAE, DINOv2-B, Semantic VAE", "images/s", 150, 300),
    Goal("encoding/tokenizer_tf32", "a step of the published VA-VAE, batch 8, TF32", "images/s"),
    Goal("encoding/tokenizer_bf16", "the same in bfloat16", "images/s"),
    Goal(
        "encoding/tokenizer", "the same, channels last and compiled", "images/s", None, 60, "6 to 58 by public reports"
    ),
    Goal("zero/0", "XL at batch 32 in DeepSpeed, ZeRO 0, not compiled", "images/s"),
    Goal("zero/1", "the same, ZeRO 1", "images/s"),
    Goal("zero/2", "the same, ZeRO 2", "images/s"),
    Goal("fashion/speed", "LightningDiT-S on Fashion-MNIST", "images/s", expected="12,000"),
    Goal("fashion/consistency", "1,000 samples of it, share a judge agrees with", "", expected="above 0.8"),
)
"""Rows of the sheet, in order. Floors and goals are of one H100 at batch 128 unless the row says otherwise."""
