"""A trace of a few steps, for the browser's tracing page or Perfetto."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from infra import logs
from infra.storage import Storage
from tasks.training.tracking import Sender

FOLDER = "profiles"
_STEPS = 5


class Profiler:
    """Traces this worker's next steps when told to; the trace goes to `profiles/` in the artifact and to MLflow."""

    def __init__(self, out: Storage, sender: Sender) -> None:
        self._out, self._sender = out, sender
        self._profile: profile | None = None
        self._left = 0

    def begin(self) -> None:
        if self._profile is None:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile, self._left = profile(activities=kinds), _STEPS
            self._profile.__enter__()

    def step(self, images_seen: int) -> None:
        """A step was done; after the last one that is traced, write."""
        if self._profile is None:
            return
        self._left -= 1
        if self._left == 0:
            found, self._profile = self._profile, None
            found.__exit__(None, None, None)
            name = f"{FOLDER}/{images_seen:014d}.json.gz"
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json.gz"
                found.export_chrome_trace(str(path))
                self._out.upload(str(path), name)
                self._sender.file(name, path.read_bytes())
            logs.say(f"profile of {_STEPS} steps: {self._out.url}/{name}")
