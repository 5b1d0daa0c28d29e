"""Servers that the environment names: whether Ray, Prefect and MLflow answer where they should.

Each check asks once, waits a few seconds at most, and says which variable to mend.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.addresses import refuse_credentials
from configs.errors import UserError
from infra import proxies

RAY, PREFECT, MLFLOW = "RAY_ADDRESS", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"
JOBS = "RAY_API_SERVER_ADDRESS"
_SECONDS = 5.0
"""How long one request may take; each check makes two at most."""
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a gRPC client says first: HTTP/2's greeting and empty settings."""
_SETTINGS = 4
_SILENT = (OSError, ValueError, http.client.HTTPException)
"""No answer, or one of something that is no web server: another service's port."""


def elsewhere() -> bool:
    """Whether stages run on a cluster's machines, of whose disks and network nothing is known here."""
    return bool(os.environ.get(JOBS)) or os.environ.get(RAY, "local") not in ("", "local")


def check_ray(address: str | None) -> str:
    """What RAY_ADDRESS leads to.

    Raises:
        UserError: nothing answers there, something else than Ray does, or it is an address of another kind.
    """
    if not address or address == "local":
        return "a local Ray, started when a stage needs it"
    scheme = address.partition("://")[0].lower() if "://" in address else ""
    if scheme in ("http", "https"):
        raise UserError(
            f"{RAY} is {address}, an address of the Jobs API: put it into {JOBS} to send stages there as jobs, or "
            f"give {RAY} the cluster's own address, HOST:6379"
        )
    if scheme:
        raise UserError(
            f"{RAY} is {address}: Ray's client cannot train; put the cluster's http://HOST:8265 into {JOBS} instead"
        )
    place = _running_here() if address == "auto" else address
    if place is None:
        raise UserError(f"{RAY} is auto, but no Ray runs on this machine: unset it, or `ray start --head` first")
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{RAY} is {address}: expected HOST:PORT, for example 127.0.0.1:6379; or unset it")
    named = f"{RAY} is {address}" if place == address else f"{RAY} is {address} ({place})"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _SECONDS) as connection:
            connection.settimeout(_SECONDS)
            connection.sendall(_PREFACE)
            header = connection.recv(9)
    except ConnectionResetError:
        header = b""
    except OSError as error:
        raise UserError(
            f"{named}, where nothing answers ({_reason(error)}): unset it for a local Ray, or start that cluster"
        ) from None
    if len(header) < 4 or header[3] != _SETTINGS:
        raise UserError(
            f"{named}, where something else than Ray answers: give the port of the cluster's head, 6379 unless told "
            f"otherwise; an address of the Jobs API goes into {JOBS}"
        )
    return f"a cluster at {place}"


def check_prefect(url: str | None) -> str:
    """What PREFECT_API_URL leads to.

    Raises:
        UserError: no Prefect server answers there.
    """
    if not url:
        return "a temporary server, started with the command"
    refuse_credentials(PREFECT, url, "put them into PREFECT_API_AUTH_STRING or PREFECT_API_KEY")
    way_out = "unset it for a temporary server, or start one with `latentforge serve`"
    status, _ = _ask(f"{url.rstrip('/')}/health", f"{PREFECT} is {url}", way_out)
    if status == 404 and not (urlsplit(url).hostname or "").endswith("prefect.cloud"):
        raise UserError(f"{PREFECT} is {url}, which has no Prefect API: its address ends in /api; or {way_out}")
    return f"the server at {url}"


def check_mlflow(uri: str | None) -> str:
    """What MLFLOW_TRACKING_URI leads to, where it is a server's address; databases are looked at elsewhere.

    Raises:
        UserError: no server answers there, or it is a folder, which this MLflow does not write to any more.
    """
    if not uri:
        return "SQLite in the home folder"
    refuse_credentials(MLFLOW, uri, "put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
    scheme = uri.partition("://")[0].lower() if "://" in uri else uri.partition(":")[0] if ":" in uri else ""
    if scheme in ("http", "https"):
        way_out = "unset it for SQLite in the home folder, or start the server"
        status, said = _ask(f"{uri.rstrip('/')}/health", f"{MLFLOW} is {uri}", way_out)
        if status != 200 or b"OK" not in said[:200]:
            raise UserError(f"{MLFLOW} is {uri}, where something else than MLflow answers ({status}): {way_out}")
        return f"the server at {uri}"
    if scheme in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() != "true":
        raise UserError(
            f"{MLFLOW} is {uri}, a folder, which this MLflow does not write to any more: name a database such as "
            "sqlite:////path/mlflow.db (`mlflow migrate-filestore` moves what is there), or unset it"
        )
    return uri


def _running_here() -> str | None:
    """Address of the Ray that `ray start` last left on this machine, where Ray itself would look for it."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text().strip() or None
    except OSError:
        return None


def _ask(url: str, named: str, way_out: str) -> tuple[int, bytes]:
    """Status and beginning of the answer to a GET; no redirects matter here."""
    through = proxies.of(url)
    way = f" through the proxy of {through}" if through else ""
    try:
        with _open(url) as answer:
            return answer.status, answer.read(1000)
    except urllib.error.HTTPError as error:
        if through and error.code in (407, 502, 503, 504):
            raise UserError(
                f"{named}, and the proxy of {through} answers {error.code} in its place: mend {through}, or add the "
                "host to NO_PROXY"
            ) from None
        return error.code, b""
    except _SILENT as error:
        if through:
            way_out = f"check {through}, or add the host to NO_PROXY; else {way_out}"
        raise UserError(f"{named}, where nothing answers{way} ({_reason(error)}): {way_out}") from None


def _open(url: str) -> Any:
    """An answer, by the proxies that the environment names now; Python's own opener remembers its first ones."""
    return urllib.request.build_opener().open(url, timeout=_SECONDS)


def answers(url: str) -> bool:
    """Whether a server of this machine does, asked past any proxy."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, http.client.HTTPException), direct.open(url, timeout=_SECONDS):
        return True
    return False


def version_of(url: str) -> str | None:
    """What a server says its version is, for a report; None where it does not."""
    for path in ("/admin/version", "/version"):
        try:
            with _open(url.rstrip("/") + path) as answer:
                text = answer.read(200).decode(errors="replace").strip()
        except _SILENT:
            continue
        try:
            return str(json.loads(text))
        except ValueError:
            return text if len(text) < 30 else None
    return None


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return f"no answer within {_SECONDS:.0f} s"
    if isinstance(cause, http.client.InvalidURL):  # whose text may hold a part of a password
        return "it is no address"
    if isinstance(cause, http.client.HTTPException) and not isinstance(cause, OSError):
        return "but something that speaks no HTTP"
    text = getattr(cause, "strerror", None) or str(cause)
    return " ".join(str(text).split())[:200] or type(error).__name__
