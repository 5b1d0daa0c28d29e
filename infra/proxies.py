"""Proxies of the environment. Nothing on this machine's own loopback is ever asked through one.

Every library here heeds `http_proxy` and its siblings, and most of them even for 127.0.0.1: without this, a proxy that
people's shells name stands between a command and the servers that it starts itself.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import MutableMapping
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NAMES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_EXCEPT = ("no_proxy", "NO_PROXY")


def spare_loopback(environment: MutableMapping[str, str] = os.environ) -> None:
    """Except loopback from the proxies, where any are set, for this process and those it starts."""
    if not named(environment):
        return
    known = [host.strip() for name in _EXCEPT for host in environment.get(name, "").split(",")]
    hosts = ",".join(dict.fromkeys([host for host in known if host] + list(LOOPBACK)))
    for name in _EXCEPT:
        environment[name] = hosts


def named(environment: MutableMapping[str, str] = os.environ) -> list[str]:
    """The variables that name proxies here."""
    return [each for name in _NAMES for each in (name, name.upper()) if environment.get(each)]


def of(url: str) -> str | None:
    """The environment variable whose proxy a request to this URL goes through; None where it goes there directly."""
    parts = urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    for scheme in (parts.scheme, "all"):
        for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            if os.environ.get(name):
                return name
    return None
