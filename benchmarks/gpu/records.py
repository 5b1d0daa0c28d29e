"""Figures as they are measured: one JSON line each, on time, and a failure is a record and never the end."""

from __future__ import annotations

import gc
import json
import math
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

Run = Callable[[], Any]


class Left(Exception):
    """A measurement that is not made here, and why: no time for it, or something that it needs is not there."""


def _foreign(error: Exception) -> bool:
    """Whether a library is not installed here."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    ours = ("benchmarks", "configs", "infra", "models", "tasks")
    return missing is not None and missing.partition(".")[0] not in ours


class Records:
    """Of one run of at most `limit` seconds, in `folder`/records.jsonl.

    small: everything a few times at toy size, for a smoke run on a CPU.
    """

    def __init__(self, folder: Path, device: torch.device, limit: float, small: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device, self.small, self.limit = folder, device, small, limit
        self.cuda = device.type == "cuda"
        self.figures: dict[str, float] = {}
        self.failed: list[str] = []
        self.skipped: dict[str, str] = {}
        self._began, self._section_ends = time.monotonic(), math.inf
        self._file = (folder / "records.jsonl").open("a", buffering=1)

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self._began)

    def note(self, name: str, **values: Any) -> None:
        """A record that is no figure of the sheet."""
        at = round(time.monotonic() - self._began, 1)
        self._file.write(json.dumps({"name": name, "at": at, **values}, default=str) + "\n")
        print(f"[{at:6.1f}] {name} " + " ".join(f"{key}={value}" for key, value in values.items())[:300], flush=True)

    def figure(self, name: str, value: float) -> None:
        """A figure of the sheet."""
        self.figures[name] = value
        self.note(name, value=float(f"{value:.4g}"))

    def section(self, name: str, run: Run, budget: float) -> None:
        """All measurements of a section, which has so many seconds of what is left."""
        self._section_ends = time.monotonic() + min(budget, max(self.left, 0.0))
        self.attempt(name, run, min(budget, 12.0))

    def attempt(self, name: str, run: Run, need: float = 0.0) -> None:
        """A measurement that takes about `need` seconds, or a section: what it holds goes when it ends, well or not.
        Its failure is a record; where there is no time for it, or it says that something is missing, that is one."""
        try:
            left = min(self.left, self._section_ends - time.monotonic())
            if not self.small and left < need:
                raise Left(f"needs {need:.0f} s, {max(left, 0.0):.0f} left")
            torch._dynamo.reset()
            self._tidy()
            run()
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, Left) or _foreign(error):
                self.skipped[name] = str(error)
                self.note(name, skipped=str(error))
                return
            self.failed.append(name)
            self.note(name, error=said)
            trace = traceback.format_exc()[-3000:]
            self._file.write(json.dumps({"name": name, "trace": trace}) + "\n")
        finally:
            self._tidy()

    def watch(self, finish: Callable[[], None]) -> None:
        """End the process 15 s after the limit, whatever hangs, with what was measured."""

        def wait() -> None:
            while self.left > -15:
                time.sleep(1)
            self.note("run", cut_off="time is up; what was being measured is lost")
            finish()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()

    # ------------------------------------------------------------------------------------------------ measures

    def seconds(self, run: Run, times: int = 10, warm: int = 3) -> float:
        """Median seconds of a call, by events on an accelerator."""
        times, warm = (2, 1) if self.small else (times, warm)
        for _ in range(warm):
            run()
        if not self.cuda:
            found = []
            for _ in range(times):
                began = time.perf_counter()
                run()
                found.append(time.perf_counter() - began)
            return median(found)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        self.sync()
        return median(a.elapsed_time(b) for a, b in pairwise(marks)) / 1e3

    def first(self, run: Run) -> float:
        """Seconds of a first call, until the device is done with it: compiling, mostly."""
        began = time.perf_counter()
        run()
        self.sync()
        return time.perf_counter() - began

    def steady(self, run: Run, times: int = 10, warm: int = 3) -> float:
        """Mean seconds of a call where many follow one another: what a training feels."""
        times, warm = (2, 1) if self.small else (times, warm)
        for _ in range(warm):
            run()
        self.sync()
        began = time.perf_counter()
        for _ in range(times):
            run()
        self.sync()
        return (time.perf_counter() - began) / times

    def waits(self, run: Run) -> dict[str, int]:
        """Where a call makes the host wait for the device: file and line, and how often."""
        if not self.cuda:
            run()
            return {}
        found: dict[str, int] = {}
        self.sync()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for each in seen:
            if "called a synchronizing" in str(each.message):
                place = f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}"
                found[place] = found.get(place, 0) + 1
        return found

    def peak_gb(self) -> float:
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else 0.0

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _tidy(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def eager_graphs() -> None:
    """On a CPU: trace and differentiate what is compiled, but run it eagerly. The slow code generator of a CPU says
    nothing of a GPU's."""
    compile_ = torch.compile
    torch.compile = lambda *given, **options: compile_(*given, **{**options, "backend": "aot_eager"})
