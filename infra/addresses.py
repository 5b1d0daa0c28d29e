"""Addresses of storage and servers, which are written into logs, manifests and MLflow: so they hold no secrets."""

from __future__ import annotations

import re

from configs.errors import UserError

_SECRET = re.compile(
    r"://[^/?@]*:[^/?@]*@|^https?://[^/?]*@|[?&](password|passwd|token|secret|sslpassword)=", re.IGNORECASE
)


def refuse_credentials(what: str, address: str, instead: str = "give credentials by the environment") -> None:
    """Raises UserError, without the address, where it holds a user, a password or a token."""
    if _SECRET.search(address):
        raise UserError(f"{what} holds credentials, which would be written into logs and beside artifacts: {instead}")
