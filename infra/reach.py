"""Whether an address outside can be reached, by the environment's proxy for it or directly.

Libraries that fetch try again and again before they tell that nothing answers, and do not tell then
whose fault it is. Asked first and once, it takes a few seconds at most.
"""

from __future__ import annotations

import base64
import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import SplitResult, unquote, urlsplit

from infra import proxies

SECONDS = 5.0
"""How long names, connections and proxies may take, each."""
_PORTS = {"https": 443, "http": 80, "socks5": 1080, "socks5h": 1080, "socks4": 1080}
_REFUSED = (403, 407, 502, 503, 504)
"""What a proxy says where it does not let a connection pass."""
_passed: set[tuple[str, str]] = set()
"""Proxies and hosts that this process has asked already, with success."""


def refusal(url: str) -> str | None:
    """Why a request to this web address would get no answer, with the way out; else None."""
    if proxies.of(url) is not None:
        return proxy_refusal(url)
    parts = urlsplit(url)
    said: list[str | None] = []
    # A name server that does not answer keeps its thread, not the command.
    looking = threading.Thread(target=lambda: said.append(_silent(parts)), daemon=True)
    looking.start()
    looking.join(2 * SECONDS)
    reason = said[0] if said else f"no answer within {2 * SECONDS:.0f} s"
    return None if reason is None else f"{parts.hostname} cannot be reached ({reason}): check the network"


def proxy_refusal(url: str) -> str | None:
    """Why the proxy for this web address does not let a request pass, with the way out.

    None where it does, or there is no proxy for it.
    """
    variable = proxies.of(url)
    if variable is None:
        return None
    host = urlsplit(url).hostname or ""
    if (os.environ[variable], host) in _passed:
        return None
    way_out = f"mend or unset {variable}, or add {host} to NO_PROXY"
    proxy, named = _proxy(variable)
    try:
        with socket.create_connection((proxy.hostname or "", _port(proxy)), SECONDS) as connection:
            status = _asked(connection, proxy, urlsplit(url))
    except (OSError, ValueError) as error:
        return f"{named}, where nothing answers ({_reason(error)}): {way_out}"
    if status in _REFUSED:
        return f"{named}, and that proxy answers {status} when asked for {host}: {way_out}"
    _passed.add((os.environ[variable], host))
    return None


def proxy_refusals(urls: Sequence[str]) -> dict[str, str]:
    """Those of these web addresses that a proxy does not let pass, with the reason; all are asked at once."""
    with ThreadPoolExecutor(len(urls)) as pool:
        said = dict(zip(urls, pool.map(proxy_refusal, urls), strict=True))
    return {url: reason for url, reason in said.items() if reason is not None}


def proxy_silent(variable: str) -> str | None:
    """That nothing answers where this variable names a proxy; None where something does."""
    proxy, named = _proxy(variable)
    said = _silent(proxy)
    return None if said is None else f"{named}, where nothing answers ({said})"


def web_address(url: str) -> str | None:
    """The web address behind a storage's URL that is asked through the environment's proxies.

    None where no such address is known.
    """
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        return url
    if parts.scheme in ("s3", "s3a"):
        named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return named or f"https://{parts.netloc}.s3.amazonaws.com"
    return None


def _asked(connection: socket.socket, proxy: SplitResult, wanted: SplitResult) -> int:
    """With which status an HTTP proxy answers; 200 for other kinds, which are not asked."""
    if proxy.scheme != "http" or wanted.scheme != "https":
        return 200
    place = f"{wanted.hostname}:{_port(wanted)}"
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if proxy.username:
        user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    words = connection.recv(64).split()
    with suppress(ValueError, IndexError):
        return int(words[1])
    return 200  # says something that is no HTTP: let the library tell


def _proxy(variable: str) -> tuple[SplitResult, str]:
    """What an environment variable names, and how to say it without a password."""
    value = os.environ[variable]
    scheme, rest = value.split("://", 1) if "://" in value else ("http", value)
    user, _, host = rest.rpartition("@")
    if set(user) & set("/?#"):  # which no address has there: the password's end would be the host
        rest = host
    return urlsplit(f"{scheme}://{rest}"), f"{variable} is {scheme}://{host}"


def _silent(parts: SplitResult) -> str | None:
    try:
        socket.create_connection((parts.hostname or "", _port(parts)), SECONDS).close()
    except (OSError, ValueError) as error:
        return _reason(error)
    return None


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS.get(parts.scheme, 80)


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {SECONDS:.0f} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
