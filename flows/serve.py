"""`make serve`: Prefect's server, a process worker and the MLflow UI on loopback, until interrupted.

On the head of a cluster MLflow also listens where the other machines find it: those that train write their curves.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.errors import UserError
from infra.home import home
from infra.servers import answers
from infra.tracking import front_page

POOL = "latentforge"
_REPOSITORY = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent
LOOPBACK = "127.0.0.1"
Server = subprocess.Popen[bytes]


def serve(prefect_port: int = 4200, mlflow_port: int = 5000, listen: str = LOOPBACK) -> None:
    """Start everything, register the deployments of `prefect.yaml`, and wait for Ctrl-C."""
    for ending in (signal.SIGTERM, signal.SIGHUP):  # else a service manager or a closed terminal would leave servers
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, lambda *_: sys.exit(0))
    with running(prefect_port, mlflow_port, listen) as environment:
        pages = front_page(environment["MLFLOW_TRACKING_URI"])
        print(
            f"\nPrefect   http://127.0.0.1:{prefect_port}\nMLflow    {pages}\n\n"
            "In another shell:\n"
            f"  export PREFECT_API_URL={environment['PREFECT_API_URL']}\n"
            f"  {_BIN / 'prefect'} deployment run sfd-full/demo\n\nCtrl-C stops all.",
            flush=True,
        )
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping")


@contextmanager
def running(prefect_port: int, mlflow_port: int, listen: str = LOOPBACK) -> Iterator[dict[str, str]]:
    """What `serve` starts while the context lasts: `servers`, deployments, automations and a worker."""
    with servers(prefect_port, mlflow_port, listen) as environment:
        _run(environment, "prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        _run(environment, "prefect", "--no-prompt", "deploy", "--all")
        _run(environment, sys.executable, "-c", "from infra import heartbeat; heartbeat.install()")
        worker = ("prefect", "worker", "start", "--pool", POOL, "--type", "process")
        with _process("worker", worker, environment):
            yield environment


@contextmanager
def servers(prefect_port: int, mlflow_port: int, listen: str = LOOPBACK) -> Iterator[dict[str, str]]:
    """Prefect's server and MLflow while the context lasts; gives the environment that talks to them.

    Args:
        prefect_port: of Prefect's server, on loopback.
        mlflow_port: of MLflow.
        listen: the address of this machine at which MLflow answers. It asks nobody who they are: a private address
            behind a firewall that lets in the cluster's own machines and nobody else.

    Raises:
        UserError: a port is taken, or a server does not come up.
    """
    folder = home()
    for what, address, port in (("prefect", LOOPBACK, prefect_port), ("mlflow", listen, mlflow_port)):
        check_free(address, port, f"--{what}-port")
    environment = _environment(folder, prefect_port, mlflow_port, listen)
    with ExitStack() as stack:
        prefect = ("prefect", "server", "start", "--host", LOOPBACK, "--port", str(prefect_port))
        mlflow = (
            *("mlflow", "server", "--host", listen, "--port", str(mlflow_port), "--workers", "1"),
            *("--artifacts-destination", environment["MLFLOW_ARTIFACTS_DESTINATION"]),
        )
        first = stack.enter_context(_process("prefect-server", prefect, environment))
        second = stack.enter_context(_process("mlflow", mlflow, environment))
        health = f"{environment['PREFECT_API_URL']}/health", f"{environment['MLFLOW_TRACKING_URI']}/health"
        _await("the Prefect server", first, health[0], folder / "prefect-server.log")
        _await("the MLflow UI", second, health[1], folder / "mlflow.log")
        yield environment


def _environment(folder: Path, prefect_port: int, mlflow_port: int, listen: str) -> dict[str, str]:
    """What the servers are told, and whoever talks to them."""
    environment = {
        **os.environ,
        "PREFECT_API_URL": f"http://127.0.0.1:{prefect_port}/api",
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{prefect_port}/api",
        "MLFLOW_TRACKING_URI": f"http://{listen}:{mlflow_port}",
        # Who died while the server was away is looked at when it is back (infra/prefect/automations.yaml).
        "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P1D",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for features that nobody here calls
        "LATENTFORGE_HOME": str(folder),
        "PWD": str(_REPOSITORY),
        "PATH": f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    # Databases: SQLite here, or what PREFECT_SERVER_DATABASE_CONNECTION_URL and MLFLOW_BACKEND_STORE_URI name.
    environment.setdefault("MLFLOW_BACKEND_STORE_URI", f"sqlite:///{folder / 'mlflow.db'}")
    environment.setdefault("MLFLOW_ARTIFACTS_DESTINATION", str(folder / "mlruns"))
    if listen != LOOPBACK:  # MLflow answers to these names only
        hosts = f"{listen}:{mlflow_port},localhost:{mlflow_port}"
        environment.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", hosts)
    return environment


def check_free(address: str, port: int, option: str) -> None:
    """Else whoever answers there would be taken for the server that is started here."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OverflowError:
            raise UserError(f"{option} {port}: ports go up to 65535") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                raise UserError(
                    f"--listen {address}: this machine has no such address; `hostname -I` lists its own"
                ) from None
            what, mend = "cannot be used", ""
            if error.errno == errno.EADDRINUSE:
                what, mend = "is taken", "stop what runs there, or "
            raise UserError(
                f"port {port} {what} ({error.strerror}): {mend}choose another with {option}",
            ) from None


@contextmanager
def _process(name: str, command: tuple[str, ...], environment: dict[str, str]) -> Iterator[Server]:
    """A child process group that logs to the home folder and ends with the context."""
    with (home() / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            command, env=environment, cwd=_REPOSITORY, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield child
        finally:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(child.pid, sign)
                    child.wait(timeout=20)
                    break
                except ProcessLookupError:
                    break
                except subprocess.TimeoutExpired:
                    continue


def _run(environment: dict[str, str], *command: str) -> None:
    done = subprocess.run(command, env=environment, cwd=_REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _await(what: str, server: Server, url: str, log: Path, seconds: float = 180.0) -> None:
    """Until it answers. Raises UserError as soon as it has ended, or does not answer in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answers(url):
            return
        if server.poll() is not None:
            raise UserError(f"{what} ended with status {server.returncode}: see {log}")
        time.sleep(0.5)
    raise UserError(f"{what} did not answer at {url} within {seconds:.0f} s: see {log}")
