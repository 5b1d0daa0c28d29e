"""This machine as processes find it: what a container's quota leaves of its CPUs, memory, disks and folders.

Nothing here imports torch, Ray or a server, so that it is known before anything is started.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

_GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60
"""What the first version of cgroups writes where no limit of memory is set is above this."""


def cpus(cgroups: Path = _CGROUPS) -> int:
    """CPUs that this process may keep busy: those it may run on, or fewer where a container's quota gives fewer.

    A quota below one CPU counts as one, and parts of a CPU are left out: as many threads as CPUs would wait for the
    rest of theirs in every period.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroups)
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota(cgroups: Path = _CGROUPS) -> float | None:
    """CPUs that cgroups (version 2, else 1) let this container use; None where they set no limit."""
    text = _text(cgroups / "cpu.max")
    if text is not None:
        quota, _, period = text.partition(" ")
        return None if quota == "max" else int(quota) / int(period or 100_000)
    quota_us, period_us = (_text(cgroups / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota_us is None or period_us is None or int(quota_us) <= 0:
        return None
    return int(quota_us) / int(period_us)


def memory(cgroups: Path = _CGROUPS) -> int:
    """Bytes of memory that this process may use: the machine's, or a container's limit where that is lower."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(cgroups / name)
        if text is not None and text != "max" and int(text) < _UNLIMITED:
            found.append(int(text))
    return min(found)


def gpus() -> list[str]:
    """Names of NVIDIA's GPUs that the driver knows, whether or not torch can use them."""
    found = []
    for about in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = (_text(about) or "").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found


def processor() -> str:
    """The CPU's name, as the system tells it."""
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def system() -> str:
    """Name and version of the operating system."""
    for line in (_text(Path("/etc/os-release")) or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return f"{line.partition('=')[2].strip(chr(34))}, kernel {os.uname().release}"
    return f"{sys.platform} {os.uname().release}"


def free(path: Path) -> int | None:
    """Bytes left for files below a path that may not exist yet; None where nobody can tell."""
    for folder in (path, *path.parents):
        if folder.exists():
            try:
                return shutil.disk_usage(folder).free
            except OSError:
                return None
    return None


def size(count: int | None) -> str:
    """Bytes for people."""
    if count is None:
        return "unknown"
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / 2**20:,.0f} MiB"


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
