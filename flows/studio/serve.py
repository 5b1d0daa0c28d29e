"""The studio's server: one process on loopback, until it is interrupted."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import secrets
import warnings

from configs.errors import UserError
from flows.studio.guard import App, Guard
from infra.home import default_root
from infra.storage import Storage

TOKEN = "LATENTFORGE_STUDIO_TOKEN"
LOOPBACK = "127.0.0.1"
LIBRARIES = "requirements-studio.lock"
_SHORTEST = 16
_PATIENCE = 60.0
"""Seconds that a page which does not answer, beside a training, is waited for."""
_HERE = frozenset({"127.0.0.1", "localhost", "::1"})


def serve(root: str | None, port: int, listen: str = LOOPBACK) -> None:
    """Serve the page over a root until Ctrl-C.

    listen: an address of this machine; any but loopback's needs a token, in LATENTFORGE_STUDIO_TOKEN.

    Raises:
        UserError: the extra is not installed, the port is taken, or there is no token where one is needed.
    """
    token = token_for(listen)
    if importlib.util.find_spec("nicegui") is None:
        raise UserError(
            f"studio: its page needs nicegui, which is not installed: `make studio`, or `python -m pip install -r "
            f"{LIBRARIES} -c requirements.lock`"
        )
    from flows.serve import check_free

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # beside a training, threads that spin would wait for ever
    place = Storage.at(root or default_root())
    check_free(listen, port, "--port")
    import uvicorn

    print(f"studio   http://{_written(listen)}:{port}\nover     {place.url}\n\nCtrl-C stops it.", flush=True)
    guarded = guard(application(place.url), token, listen)
    uvicorn.run(guarded, host=listen, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=3)


def guard(app: App, token: str, listen: str) -> App:
    """The application behind its door; on loopback it has no other names than this machine's own."""
    return Guard(app, token, _HERE | {listen} if _is_loopback(listen) else frozenset())


def token_for(listen: str) -> str:
    """What visitors must know where the studio listens there; empty on loopback where none is set.

    Raises:
        UserError: another address and no token, or one that can be guessed.
    """
    token = os.environ.get(TOKEN, "")
    if (token or not _is_loopback(listen)) and len(token) < _SHORTEST:
        found = "a short one" if token else "none"
        raise UserError(
            f"studio --listen {listen}: asks its visitors for a token of {_SHORTEST} letters or more, found {found}: "
            f"export {TOKEN}=, for example {secrets.token_urlsafe(18)}; outside of your own network put TLS before it"
        )
    return token


def application(root: str) -> App:
    """The page over a root as an ASGI application, for one process."""
    from fastapi import FastAPI
    from nicegui import ui

    from flows.studio import page

    # At its start the library looks at every object of the process, and torch's warn of being looked at.
    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
    app = FastAPI(title="latentforge studio", docs_url=None, redoc_url=None, openapi_url=None)
    page.register(root)
    ui.run_with(app, title="latentforge studio", favicon="🔨", dark=None, reconnect_timeout=_PATIENCE)
    return app


def _is_loopback(listen: str) -> bool:
    try:
        return ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return listen == "localhost"


def _written(listen: str) -> str:
    return f"[{listen}]" if ":" in listen else listen
