"""The Ray a stage runs on: the cluster it was started in, or a local one of its own.

Ray is imported where it is used: training in one process, and whoever measures it, needs none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

from configs.compute import ActorCompute
from configs.errors import UserError, brief
from infra import machine, proxies

_CODE = str(Path(__file__).parents[1])
SETTINGS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # the version of uv or pip that started us must not be rebuilt in workers
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # a worker's line appears once, not twice
}
"""Of Ray, in every process of a stage."""
KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""For a process that runs networks on a CPU: what its tensors free stays, in one place, for the next ones.

Networks free and ask for blocks of many MiB in every layer, and getting each anew from the system costs a third of the
time. Only glibc reads this, once, when a process starts: told later, threads that have a heap of their own (as those of
an actor have) would go on giving theirs back."""


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, else start a local Ray on loopback; nothing if already connected."""
    import ray

    if ray.is_initialized():
        return
    proxies.spare_loopback()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, job_config=job_config())
        except (ConnectionError, RuntimeError) as error:  # dead, or of another version of Ray or Python
            reason = brief(error, 300)
            raise UserError(
                f"the Ray of RAY_ADDRESS, {address}, cannot be joined ({reason}): unset it for a local Ray, or start "
                "that cluster from this requirements.lock"
            ) from None
        return
    with _known_to_its_workers():
        ray.init(
            address="local",
            num_cpus=max(2, machine.cpus()),
            include_dashboard=True,  # Ray Train asks its state interface whether a training is still alive
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=True,
            job_config=job_config(),
        )


@contextmanager
def _known_to_its_workers() -> Iterator[None]:
    """While a local Ray starts, the environment that its workers inherit says where it is.

    Else they take any Ray of this machine for theirs: where two commands train at once, Ray Train's
    watcher of the one asks the other's Ray whether its training lives, hears that it does not, and
    ends it.
    """
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ[name] for name in told if name in os.environ}
    os.environ |= told
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]
        os.environ |= before


def job_config() -> Any:
    """Workers find our packages first.

    Ray lets them look in the command's current folder before anywhere else, and another project may lie there that has
    packages of the same names.
    """
    from ray.job_config import JobConfig

    class OursFirst(JobConfig):
        def _serialize(self) -> str:
            self._py_driver_sys_path.append(_CODE)  # each goes before those in front of it
            serialized: str = super()._serialize()
            return serialized

    return OursFirst()


def require_gpus(field: str, wanted: float) -> None:
    """Refuse a stage that would wait for ever for accelerators this machine does not have; a cluster may grow."""
    import ray

    found = ray.cluster_resources().get("GPU", 0.0)
    if found < wanted and not os.environ.get("RAY_ADDRESS"):
        raise UserError(
            f"{field} is {wanted:g} but Ray finds {found:g} GPUs on this machine: set {field}: 0 to run on its CPUs, "
            "or name a cluster in RAY_ADDRESS"
        )


def actor_options(compute: ActorCompute, cpus: float | None = None) -> dict[str, Any]:
    """What an actor with networks asks Ray for: its share of the machine and, on a CPU, an allocator that keeps memory.

    Args:
        cpus: in place of `compute.cpus_per_actor`, where a machine is shared otherwise.
    """
    options: dict[str, Any] = {
        "num_cpus": compute.cpus_per_actor if cpus is None else cpus,
        "num_gpus": compute.gpus_per_actor or None,
    }
    return options if compute.gpus_per_actor else options | {"runtime_env": {"env_vars": KEEP_FREED_MEMORY}}


def disconnect() -> None:
    """Leave the cluster; a local one ends with its processes."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
