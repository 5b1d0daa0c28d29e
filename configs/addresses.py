"""Addresses of storage and servers, which are written into logs, manifests and MLflow: so they hold no secrets."""

from __future__ import annotations

import re

from configs.errors import UserError

_SECRET = re.compile(
    r"://[^/?@\s]*:[^/?@\s]*@|\bhttps?://[^/?@\s]*@"
    r"|[?&][\w-]*(passw(or)?d|token|secret|signature|credential|api_?key|accesskeyid)=|[?&](sig|key)=",
    re.IGNORECASE,
)
"""A user with a password, a user of a web server, and what signed and keyed addresses of clouds and hubs hold."""


def holds_credentials(text: str) -> bool:
    """Whether a text has an address with a user, a password or a token in it."""
    return bool(_SECRET.search(text))


def refuse_credentials(what: str, address: str, instead: str = "give credentials by the environment") -> None:
    """Raises UserError, without the address, where it holds a user, a password or a token."""
    if holds_credentials(address):
        raise UserError(f"{what} holds credentials, which would be written into logs and beside artifacts: {instead}")
