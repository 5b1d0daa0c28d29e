"""A Prefect server for one command, where the environment names none.

Prefect would start one itself, in the command's process group, where a Ctrl-C ends it before anybody could tell it how
the run ended, and which outlives a command that was killed. This one is in a group of its own, leaves when its command
is gone, and several commands that start at once make its database one after the other.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from configs.errors import UserError
from infra.home import home
from infra.locks import alone

_START_SECONDS = 180.0
_ATTEMPTS = 3
_FAREWELL_SECONDS = 2.0
_WATCH_SECONDS = 1.0
_GRACE_SECONDS = 10.0
"""How long a server whose command is gone may take to end."""
_SETTINGS = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""As Prefect gives them to a temporary server of its own."""


_started_here: list[int] = []


def start() -> None:
    """Start a server for this process and let Prefect know; nothing where the environment names one.

    Raises:
        UserError: it does not come up.
    """
    from prefect import context
    from prefect.settings import get_current_settings

    if get_current_settings().api.url:
        return
    folder = home()
    with alone(f"the database in {os.environ.get('PREFECT_HOME', folder)}", "opens"):
        for _ in range(_ATTEMPTS):
            server, port = _started()
            if _answers(server, port):
                break
        else:
            raise UserError(f"Prefect's temporary server does not start: see {_log()}")
    atexit.register(_stop, server)
    _started_here.append(port)
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    context.refresh_global_settings_context()


def is_temporary() -> bool:
    """Whether Prefect's server is one of this process's own."""
    return bool(_started_here)


def _log() -> str:
    return str(home() / "prefect-temporary.log")


def command(port: int) -> list[str]:
    """Starts the server; not with what lies in the current folder, which may be another project."""
    return [sys.executable, "-P", "-m", "infra.prefect_server", str(port), str(os.getpid())]


def environment() -> dict[str, str]:
    """Of its process, which finds our packages first."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **_SETTINGS, "PYTHONPATH": path}


def _started() -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with open(_log(), "ab") as log:
        server = subprocess.Popen(
            command(port), env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return server, port


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it is up; False where it ended, as when somebody else took the port meanwhile."""
    from infra import servers

    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        if servers.answers(f"http://127.0.0.1:{port}/api/health"):
            return True
        time.sleep(0.1)
    server.kill()
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    """It ends by itself from here; whoever is in a hurry need not see it."""
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(_FAREWELL_SECONDS)


# -------------------------------------------------------------------------------------------------- the server's side


def main(port: int, command: int) -> None:
    """Serve on loopback until SIGTERM, or until the process of this command is gone."""
    import uvicorn

    threading.Thread(target=_watch, args=(command,), daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=3,
    )


def _watch(command: int) -> None:
    while os.getppid() == command:
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
