"""What a training says while it runs: means of loss terms, speed, waiting and memory; from rank 0, off the step."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infra import logs, metrics
from infra.tracking import Tracker
from tasks.training.tracking import Point, Sender

Curves = dict[str, list[list[float]]]
"""(images seen, value) points by name."""

SECONDS, PROCESSOR_SECONDS = "clock/seconds", "clock/processor_seconds"
"""Curves of the time that training took so far, over all its starts: wall clock, and processor time of rank 0."""
_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_REQUESTS = 10.0
_CURVE_POINTS = 200
_BY_TIME = "by_time/"
_CHARTS = "when/"
"""What the twenty charts of errors by time are called in MLflow, which shows sections in alphabetical order: last."""
_BINS = 10
_PEAK_TERAFLOPS = {
    **{"B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989},
    **{"A100": 312, "L40S": 362, "L40": 181, "L4": 121, "V100": 125},
}
"""Dense bfloat16 products (float16 on V100), from the makers' data sheets; the first name that fits counts."""


class Metrics:
    """Collects scalars of every step without reading them, and speaks every `every` images.

    Every worker has one and all take the same steps; what is said is the mean over workers, by rank 0.

    flops_per_image: of the network's forward and backward pass, for the utilisation of the device (MFU).
    """

    def __init__(
        self,
        stage: str,
        total_images: int,
        every: int,
        tracker: Tracker,
        device: torch.device,
        flops_per_image: float | None = None,
    ) -> None:
        self.stage, self.total_images, self.every = stage, total_images, every
        self.curves: Curves = {}
        self.sender = Sender(tracker)
        self._device, self._flops, self._peak = device, flops_per_image, peak_flops(device)
        self._sums: dict[str, Tensor] = {}
        self._bins: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._waited = 0.0
        self._mark = self._said = self._sent = time.monotonic()
        self._worked = time.process_time()
        self._queue: list[Point] = []
        self._due = every

    def resume(self, images_seen: int, curves: Curves) -> None:
        self.curves = curves
        self._due = images_seen + self.every
        self._forget()

    def begin(self) -> None:
        """The first step comes now: what was before is no time of training."""
        self._mark, self._worked = time.monotonic(), time.process_time()

    def step(
        self,
        images_seen: int,
        images: int,
        parts: list[dict[str, Tensor]],
        state: dict[str, Tensor],
        rate: float,
        waited: float,
    ) -> None:
        """Take the terms of a step's accumulation parts, and scalars about the step as a whole.

        Nothing is read from the device until it is time to speak. `waited` are the seconds without data.
        """
        self._waited += waited
        for terms in parts:
            for name, value in terms.items():
                if value.ndim == 0:
                    self._add(f"loss/{name}", value.detach() / len(parts))
                elif name.startswith(_BY_TIME):
                    self._sort(name.removeprefix(_BY_TIME), value)
        for name, value in state.items():
            self._add(name, value)
        self._steps += 1
        self._images += images
        if images_seen >= min(self._due, self.total_images):
            self._due = images_seen + self.every
            self._speak(images_seen, rate)

    def log(self, values: dict[str, float], images_seen: int) -> None:
        """Figures that were found at once, alike in all workers."""
        for name, value in values.items():
            self._queue.append((name, value, images_seen))
            self._curve(name, value, images_seen)

    def finish(self) -> None:
        """Send what was not sent yet, and wait for it."""
        self._send()
        if dist.get_rank() == 0:
            self.sender.finish()

    # ------------------------------------------------------------------------------------------------ parts

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value.float().clone()

    def _sort(self, name: str, points_2B: Tensor) -> None:
        """Into bins by time: how many errors, and their sum."""
        times, errors = points_2B.detach().float()
        if name not in self._bins:
            self._bins[name] = torch.zeros(2, _BINS, device=times.device)
        places = (times * _BINS).long().clamp(0, _BINS - 1)
        self._bins[name].index_add_(1, places, torch.stack([torch.ones_like(errors), errors]))

    def _collected(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means of scalars and of bins that are not empty, over all workers: the one read from the device."""
        world = dist.get_world_size()
        scalars = torch.stack(list(self._sums.values()))
        waited = torch.tensor([self._waited], device=scalars.device)
        collected = torch.cat([scalars, waited, *(bins.flatten() for bins in self._bins.values())])
        dist.all_reduce(collected)
        values = collected.tolist()
        means = [value / (self._steps * world) for value in values[: len(self._sums)]]
        self._waited = values[len(self._sums)] / world
        binned: dict[str, float] = {}
        for number, name in enumerate(self._bins):
            start = len(self._sums) + 1 + number * 2 * _BINS
            counts, sums = values[start : start + _BINS], values[start + _BINS : start + 2 * _BINS]
            for place, (count, total) in enumerate(zip(counts, sums, strict=True)):
                if count:
                    binned[f"{_CHARTS}{name}/{place / _BINS:.1f}"] = total / count
        return dict(zip(self._sums, means, strict=True)), binned

    def _speak(self, images_seen: int, rate: float) -> None:
        means, binned = self._collected()
        now = time.monotonic()
        seconds = max(now - self._mark, 1e-9)
        speed = self._images / seconds
        worked = time.process_time()
        for name, passed in ((SECONDS, seconds), (PROCESSOR_SECONDS, worked - self._worked)):
            before = self.curves[name][-1][1] if name in self.curves else 0.0
            self._curve(name, before + passed, images_seen)
        self._worked = worked
        values = {
            "images_per_second": speed,
            "images_per_second_per_device": speed / dist.get_world_size(),
            "data_wait_share": self._waited / seconds,
            "learning_rate": rate,
            "peak_memory_mib": self._memory_mib(),
        }
        if self._flops is not None and self._peak is not None:
            values["mfu"] = values["images_per_second_per_device"] * self._flops / self._peak
        for name, value in (means | binned | values).items():
            self._queue.append((name, value, images_seen))
        for name, value in means.items():
            if name.startswith("loss/") or name == "gradient_norm":
                self._curve(name.removeprefix("loss/"), value, images_seen)
        if dist.get_rank() == 0:
            metrics.progress(self.stage, self._images, max(0, self.total_images - images_seen), speed)
            for name in ("mfu", "data_wait_share"):
                if name in values:
                    metrics.gauge(f"latentforge_{name}", values[name], stage=self.stage)
        if now - self._said > _SECONDS_BETWEEN_LINES or images_seen >= self.total_images:
            self._said = now
            self._print(images_seen, means, values)
        if now - self._sent > _SECONDS_BETWEEN_REQUESTS:
            self._send()
        self._forget()

    def _send(self) -> None:
        if dist.get_rank() == 0:
            self.sender.points(self._queue)
        self._queue = []
        self._sent = time.monotonic()

    def _forget(self) -> None:
        self._sums, self._bins, self._steps, self._images, self._waited = {}, {}, 0, 0, 0.0
        self._mark = time.monotonic()

    def _curve(self, name: str, value: float, images_seen: int) -> None:
        points = self.curves.setdefault(name, [])
        points.append([float(images_seen), value])
        if len(points) > 2 * _CURVE_POINTS:
            self.curves[name] = points[::2]

    def _print(self, images_seen: int, means: dict[str, float], values: dict[str, Any]) -> None:
        if dist.get_rank() != 0:
            return
        share = min(1.0, images_seen / max(1, self.total_images))
        bar = ("━" * round(20 * share)).ljust(20, "·")
        losses = {name.removeprefix("loss/"): value for name, value in means.items() if name != "left_out" or value}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in losses.items() if "/" not in name)
        used = f"  MFU {100 * values['mfu']:.0f} %" if "mfu" in values else ""
        figures = {name: round(value, 4) for name, value in values.items()}
        logs.say(
            f"{self.stage:>12} {bar} {100 * share:3.0f} %  {images_seen:,} images  {values['images_per_second']:,.0f}/s"
            f"{used}  wait {100 * values['data_wait_share']:.0f} %  {values['peak_memory_mib']:,.0f} MiB  {shown}",
            stage=self.stage,
            images=images_seen,
            total=self.total_images,
            **figures,
        )

    def _memory_mib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_flops(device: torch.device) -> float | None:
    """Products in half precision that a device does at most in a second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * value for known, value in _PEAK_TERAFLOPS.items() if known in name), None)
