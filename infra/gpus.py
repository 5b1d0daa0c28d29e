"""Whether a machine's GPUs are there: asked before it joins a cluster, so that no work waits for GPUs
that are only announced.

`python -m infra.gpus 8` says `8 of 8 GPUs visible` or why fewer are, and ends with status 1. Without
a number it takes the one that Ray was told to announce (`ray up` puts it into RAY_OVERRIDE_RESOURCES).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from configs.errors import UserError

_OVERRIDE = "RAY_OVERRIDE_RESOURCES"
_VERSION = Path("/proc/driver/nvidia/version")
_OLDEST_DRIVER = {12: (525, 60, 13), 13: (580, 65, 6)}
"""By major version of CUDA: the oldest Linux driver that runs it (NVIDIA's table of CUDA's minor-version
compatibility)."""


def require(expected: int) -> list[str]:
    """Names of the GPUs that torch sees in this process, at least `expected` of them.

    Raises:
        UserError: there are fewer; it says what stands in the way, as far as this machine tells.
    """
    found = _names()
    if len(found) < expected:
        raise UserError(f"{len(found)} of {expected} GPUs visible: {_reason()}")
    return found


def announced() -> int:
    """How many GPUs Ray will say that this machine has; 0 where nobody told it."""
    return int(json.loads(os.environ.get(_OVERRIDE) or "{}").get("GPU", 0))


def _reason() -> str:
    driver, needed = _driver(), _OLDEST_DRIVER.get(int(_cuda().partition(".")[0] or 0))
    oldest = ".".join(f"{part:02d}" for part in needed) if needed else "the newest"
    if driver is None:
        return f"no NVIDIA driver is loaded; install driver {oldest} or later, which CUDA {_cuda()} needs"
    if needed and tuple(map(int, driver.split("."))) < needed:
        return f"driver {driver} is older than {oldest}, which CUDA {_cuda()} needs; take an image with a newer one"
    if not _devices():
        return (
            "the driver is loaded, but this container was given no device; start it with --gpus all (NVIDIA's "
            "container toolkit), or ask Kubernetes for nvidia.com/gpu"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}; unset it"
    return f"driver {driver} runs {', '.join(_devices())}; `nvidia-smi` shows which are at fault, take another machine"


def _names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _cuda() -> str:
    """The version of CUDA that torch was built with; empty where it was built without."""
    import torch

    return torch.version.cuda or ""


def _driver() -> str | None:
    """Version of the kernel's driver, which containers see too."""
    found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", _VERSION.read_text()) if _VERSION.exists() else None
    return found[0] if found else None


def _devices() -> list[str]:
    return sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def main(arguments: list[str]) -> int:
    """The command; its exit status."""
    expected = int(arguments[0]) if arguments else announced()
    try:
        found = require(expected)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(found)} of {expected} GPUs visible" + "".join(f", {name}" for name in sorted(set(found))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
