"""`latentforge doctor`: what a command would find here, in a form to paste into a bug report. No secrets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from infra import environment, machine, servers
from infra.home import HOME, place

_LIBRARIES = ("torch", "ray", "deepspeed", "prefect", "mlflow", "timm", "pyarrow", "fsspec", "s3fs", "numpy")
_VARIABLES = (
    *(HOME, "LATENTFORGE_ROOT", servers.RAY, servers.JOBS, servers.PREFECT, servers.MLFLOW),
    *("PREFECT_HOME", "PYTHONPATH", "RAY_TMPDIR", "TMPDIR", "AWS_ENDPOINT_URL", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *("NO_PROXY", "no_proxy"),
)
"""What decides how a run goes and is no secret by itself."""
_USER = re.compile(r"(^|//)[^/\s]*@")
"""Before a host; proxies are named with a scheme or without."""
_QUERY = re.compile(r"\?\S*")
_MARKS = {"fine": "ok", "note": "note", "refused": "WRONG"}


def report() -> tuple[str, bool]:
    """The report as text, and whether a run would start here."""
    findings = environment.look()
    rows = [*_facts(), *((f"{f.name}: {_MARKS[f.level]}", f.text) for f in findings)]
    width = max(len(name) for name, _ in rows)
    text = "\n".join(f"{name:<{width}}  {_masked(value)}" for name, value in rows)
    return text, all(finding.level != "refused" for finding in findings)


def _facts() -> Iterator[tuple[str, str]]:
    yield "latentforge", " ".join(filter(None, (_version("latentforge"), _commit())))
    yield "python", f"{sys.version.split()[0]} at {sys.executable}"
    yield "system", machine.system()
    quota = machine.cpu_quota()
    limited = f", a quota of {quota:g}" if quota is not None else ""
    yield "CPUs", f"{machine.cpus()} of {os.cpu_count()}{limited}: {machine.processor()}"
    yield "memory", machine.size(machine.memory())
    yield "GPUs", ", ".join(machine.gpus()) or "none"
    yield "disk", f"{machine.size(machine.free(place()))} left for {place()}"
    yield "libraries", ", ".join(f"{name} {_version(name) or 'missing'}" for name in _LIBRARIES)
    for name in _VARIABLES:
        if os.environ.get(name):
            yield name, os.environ[name]
    for variable in (servers.PREFECT, servers.MLFLOW):
        if (url := os.environ.get(variable, "")).startswith("http"):
            yield f"version at {variable}", servers.version_of(url) or "unknown"


def _masked(text: str) -> str:
    """Without users, passwords and tokens of addresses."""
    text = _USER.sub(r"\1…@", text)
    return _QUERY.sub("?…", text) if "//" in text else text


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of a checkout; None where the code was installed otherwise."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
