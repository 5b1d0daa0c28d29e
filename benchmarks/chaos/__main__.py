"""A quiet run, and the same under random fire: goodput, slowdown and whether the bytes are the same.

The tiny flow runs on several Ray nodes of this machine, its artifacts on a real S3 server, its runs at real Prefect and
MLflow servers, all three behind proxies. A fault is one of the gremlin's kinds, evenly from a seed; a flow that ends
otherwise than well is started again with the same command, and nobody else lays a hand on it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

from benchmarks.chaos import account
from benchmarks.chaos.gremlin import KINDS, Gremlin
from benchmarks.chaos.proxy import Proxy
from benchmarks.s3_server import free_ports, s3_server
from tests.helpers.nodes import RayNodes, ray_nodes

REPOSITORY = Path(__file__).parents[2]
NODES = 2


class Run:
    """The flow's command, started again until it ends well."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, dict(environment), log
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def until_done(self, deadline: float) -> bool:
        """Whether it ended well by then."""
        while time.monotonic() < deadline:
            self.starts += 1
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    self._command, cwd=REPOSITORY, env={**os.environ, **self._environment}, stdout=log, stderr=log
                )
                try:
                    if self.process.wait(timeout=max(1.0, deadline - time.monotonic())) == 0:
                        return True
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    self.process.kill()  # nothing where it has ended
                    self.process.wait()
            time.sleep(1.0)
        return False


class Place:
    """Storage, proxies and nodes, as long as they are wanted."""

    def __init__(self, stack: ExitStack, folder: Path, served: Mapping[str, str]) -> None:
        """served: the environment of a home and of the Prefect and MLflow that its runs talk to."""
        storage = stack.enter_context(s3_server(_made(folder / "s3")))
        addresses = {
            "storage": storage["AWS_ENDPOINT_URL"],
            "mlflow": served["MLFLOW_TRACKING_URI"],
            "prefect": served["PREFECT_API_URL"],
        }
        self.proxies = {name: Proxy(int(urlsplit(each).port or 0)) for name, each in addresses.items()}
        reach = {name: stack.enter_context(proxy.running()) for name, proxy in self.proxies.items()}
        self.environment = {
            "OMP_NUM_THREADS": "1",
            **served,
            **storage,
            "AWS_ENDPOINT_URL": f"http://{reach['storage']}",
            "MLFLOW_TRACKING_URI": f"http://{reach['mlflow']}",
            "PREFECT_API_URL": f"http://{reach['prefect']}/api",
        }
        self.nodes: RayNodes = stack.enter_context(ray_nodes(self.environment))
        self.members = [self.nodes.add(num_cpus=2) for _ in range(NODES)]


@contextmanager
def _served(folder: Path) -> Iterator[dict[str, str]]:
    """A home of its own with its servers; the environment that reaches them."""
    from flows.serve import servers

    home = {"LATENTFORGE_HOME": str(_made(folder / "home")), "PREFECT_HOME": str(folder / "home" / "prefect")}
    with patch.dict(os.environ, home), servers(*free_ports(2)) as found:
        yield {**home, **{name: found[name] for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")}}


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measured(place: Place, folder: Path, name: str, recipe: str, deadline: float, gremlin: Gremlin | None) -> dict:
    """One run to its end; its seconds, its work and its manifests."""
    root = f"s3://latents/{name}"
    command = [sys.executable, "-m", "flows", "run", "sfd-full", "--recipe", recipe, "--root", root]
    # Nodes of one machine share a folder for what is sent along: they take the code from here.
    command += ["--set", f"compute.cluster.code={REPOSITORY}", "--set", "compute.train.checkpoint_every=64"]
    command += ["--set", "compute.train.max_failures=100", "--set", "compute.train.log_every=32"]
    run = Run(command, {**place.environment, **place.nodes.environment}, folder / f"{name}.log")
    began, epoch = time.monotonic(), time.time()
    ended = threading.Event()
    haunting = threading.Thread(target=lambda: gremlin and gremlin.haunt(ended), daemon=True)
    if gremlin is not None:
        gremlin.flow = run.pid
    haunting.start()
    try:
        well = run.until_done(deadline)
    finally:  # else whoever breaks it off would have nodes killed, and others started, meanwhile
        seconds = time.monotonic() - began
        ended.set()
        haunting.join()
    manifests = _of_root(place, root)
    written = [each for each in place.proxies["storage"].written if f"/{name}/" in each[1]]
    done = [*account.parts_written(written, manifests, began), *account.images_trained(_told(place, epoch), epoch)]
    return {"well": well, "seconds": seconds, "starts": run.starts, "done": done, "manifests": manifests}


def _told(place: Place, epoch: float) -> Iterator[tuple[float, str, int]]:
    """What trainings told MLflow since then."""
    from mlflow import MlflowClient

    client = MlflowClient(place.environment["MLFLOW_TRACKING_URI"])
    experiments = [each.experiment_id for each in client.search_experiments()]
    for run in client.search_runs(experiments, f"attributes.start_time >= {int(1000 * epoch)}"):
        if str(run.info.run_name).startswith("train_"):
            for point in client.get_metric_history(run.info.run_id, "images_per_second"):
                yield point.timestamp / 1000, str(run.info.run_name), point.step


def _of_root(place: Place, root: str) -> dict[str, Any]:
    os.environ.update({name: value for name, value in place.environment.items() if name.startswith("AWS_")})
    return account.standing(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=29.0, help="when to give up, the quiet run included")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two faults")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of faults, by commas")
    parser.add_argument("--recipe", default="demo_tiny")
    parser.add_argument("--folder", type=Path, help="where servers and logs lie; a temporary one is deleted")
    arguments = parser.parse_args()
    kinds = tuple(arguments.kinds.split(","))
    if strange := set(kinds) - set(KINDS):
        parser.error(f"no such kinds: {', '.join(sorted(strange))}; there are {', '.join(KINDS)}")
    deadline = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # else servers would stay
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        place = Place(stack, folder, stack.enter_context(_served(folder)))
        quiet = measured(place, folder, "quiet", arguments.recipe, deadline, None)
        gremlin = Gremlin(
            arguments.seed, kinds, arguments.every, place.nodes, place.members, lambda: None, place.proxies
        )
        fired = measured(place, folder, "fired", arguments.recipe, deadline, gremlin)
        account.charge(gremlin.faults, fired["done"])
        print(json.dumps(summary(quiet, fired, gremlin, arguments.seed)), flush=True)
    return 0 if fired["well"] else 1


def summary(quiet: dict, fired: dict, gremlin: Gremlin, seed: int) -> dict[str, Any]:
    """The last line; a run that was cut off is no measure of slowness nor of what its bytes would have been."""
    computed = sum(each.units for each in fired["done"])
    again = sum(each.again for each in fired["done"])
    same = {
        stage: stage in fired["manifests"] and fired["manifests"][stage].files == manifest.files
        for stage, manifest in quiet["manifests"].items()
        if stage in account.STAGES
    }
    return {
        "benchmark": "chaos",
        "goodput": round(1 - again / computed, 3) if computed else None,
        "slowdown": round(fired["seconds"] / quiet["seconds"], 2) if quiet["well"] and fired["well"] else None,
        "same_bytes": quiet["well"] and bool(same) and all(same.values()),
        "differs": [stage for stage, each in same.items() if not each],
        "finished": fired["well"],
        "faults": len(gremlin.faults),
        "faults_per_minute": round(60 * len(gremlin.faults) / fired["seconds"], 2),
        "by_kind": account.by_kind(gremlin.faults),
        "images_computed": computed,
        "images_again": again,
        "starts": fired["starts"],
        "seconds": {"quiet": round(quiet["seconds"], 1), "fired": round(fired["seconds"], 1)},
        "seed": seed,
    }


if __name__ == "__main__":
    sys.exit(main())
