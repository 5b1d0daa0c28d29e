"""What a training says while it runs: means of loss terms, speed, waiting and memory; from rank 0, off the step."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from torch import Tensor

from infra.tracking import Tracker

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_REQUESTS = 10.0
_CURVE_POINTS = 200


class Metrics:
    """Collects scalars of every step without reading them, and speaks every `every` images."""

    def __init__(self, stage: str, total_images: int, every: int, tracker: Tracker, device: torch.device) -> None:
        self.stage, self.total_images, self.every = stage, total_images, every
        self.curves: dict[str, list[list[float]]] = {}
        self._tracker, self._device = tracker, device
        self._sums: dict[str, Tensor] = {}
        self._steps = self._images = 0
        self._waited = 0.0
        self._mark = self._said = self._sent = time.monotonic()
        self._queue: list[tuple[str, float, int]] = []
        self._due = every

    def resume(self, images_seen: int, curves: dict[str, list[list[float]]]) -> None:
        self.curves = curves
        self._due = images_seen + self.every

    def step(
        self, images_seen: int, images: int, parts: list[dict[str, Tensor]], norm: Tensor, rate: float, waited: float
    ) -> None:
        """Take the scalars among the terms of a step's accumulation parts, and its gradient's norm.

        Nothing is read from the device until it is time to speak. `waited` are the seconds without data.
        """
        self._waited += waited
        for terms in [*parts, {"gradient_norm": norm * len(parts)}]:
            for name, value in terms.items():
                if value.ndim == 0:
                    share = value.detach() / len(parts)
                    self._sums[name] = self._sums[name] + share if name in self._sums else share
        self._steps += 1
        self._images += images
        if images_seen >= self._due:
            self._due = images_seen + self.every
            self._speak(images_seen, rate)

    def flush(self) -> None:
        self._tracker.series(self._queue)
        self._queue = []
        self._sent = time.monotonic()

    def _speak(self, images_seen: int, rate: float) -> None:
        now = time.monotonic()
        seconds = max(now - self._mark, 1e-9)
        names = list(self._sums)
        means = (torch.stack([self._sums[name].float() for name in names]) / self._steps).tolist()
        losses = dict(zip(names, means, strict=True))
        speed, waiting = self._images / seconds, self._waited / seconds
        values = {f"loss/{name}": value for name, value in losses.items()}
        values |= {
            "images_per_second": speed,
            "data_wait_share": waiting,
            "learning_rate": rate,
            "peak_memory_mib": self._memory_mib(),
        }
        self._queue += [(name, value, images_seen) for name, value in values.items()]
        for name, value in losses.items():
            self.curves.setdefault(name, []).append([float(images_seen), value])
            if len(self.curves[name]) > 2 * _CURVE_POINTS:
                self.curves[name] = self.curves[name][::2]
        if now - self._said > _SECONDS_BETWEEN_LINES or images_seen >= self.total_images:
            self._said = now
            self._print(images_seen, losses, values)
        if now - self._sent > _SECONDS_BETWEEN_REQUESTS:
            self.flush()
        self._sums, self._steps, self._images, self._waited, self._mark = {}, 0, 0, 0.0, time.monotonic()

    def _print(self, images_seen: int, losses: dict[str, float], values: dict[str, Any]) -> None:
        share = min(1.0, images_seen / max(1, self.total_images))
        bar = ("━" * round(20 * share)).ljust(20, "·")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in losses.items() if "/" not in name)
        print(
            f"{self.stage:>12} {bar} {100 * share:3.0f} %  {images_seen:,} images  {values['images_per_second']:,.0f}/s"
            f"  wait {100 * values['data_wait_share']:.0f} %  {values['peak_memory_mib']:,.0f} MiB  {shown}",
            flush=True,
        )

    def _memory_mib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
