"""Who may come in: on loopback whoever is on this machine, elsewhere whoever knows the token.

Everything passes here, pages and websockets alike. A page of another site cannot reach the studio
through its visitor's browser: the address that is asked for must be the studio's own, a page that
asks by a script must be of it (answers allow any, by the library's choice), and none has it in a
frame, where its buttons could lie under others.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ENTER = "/enter"
_COOKIE = "latentforge-studio"
_LONGEST_FORM = 4096
_FRAMES = ("iframe", "frame", "embed", "object")
_FORM = b"""<!doctype html><meta charset="utf-8"><title>latentforge studio</title>
<body style="font: 16px system-ui; display: grid; place-items: center; min-height: 90vh">
<form method="post" action="/enter"><label>Token<br><input type="password" name="token" autofocus required
autocomplete="current-password"></label> <button>Enter</button><p>It is what LATENTFORGE_STUDIO_TOKEN says where the
studio was started.</p></form>"""


class Guard:
    """An application that lets through to another what may.

    token: what a visitor must know; empty asks for none.
    hosts: names under which the studio may be asked for; empty takes any.
    """

    def __init__(self, app: App, token: str = "", hosts: frozenset[str] = frozenset()) -> None:
        self._app, self._token, self._hosts = app, token.encode(), hosts
        # A cookie of this process says that its holder knew the token; the token itself never comes back.
        self._pass = secrets.token_urlsafe(32).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._at_home(headers):
            await _refuse(scope, send, 403, b"asked for under another name, or by another site's page\n")
        elif self._known(headers):
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == ENTER:
            await self._enter(receive, send)
        else:
            await _refuse(scope, send, 401, _FORM, "text/html; charset=utf-8")

    def _at_home(self, headers: dict[str, str]) -> bool:
        host = headers.get("host", "")
        origin = headers.get("origin")  # a link has none, nor have programs, which have nobody's cookie
        try:
            named, asking = urlsplit(f"//{host}").hostname, urlsplit(origin or f"//{host}").netloc
        except ValueError:
            return False
        known = not self._hosts or named in self._hosts
        return known and asking == host and headers.get("sec-fetch-dest") not in _FRAMES

    def _known(self, headers: dict[str, str]) -> bool:
        if not self._token:
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(given, self._token):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(_COOKIE)
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, self._pass)

    async def _enter(self, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more and len(body) <= _LONGEST_FORM:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            given = parse_qs(body[:_LONGEST_FORM].decode()).get("token", [""])[0]
        except ValueError:
            given = ""
        if not _equal(given, self._token):
            await _answer(send, 401, _FORM, "text/html; charset=utf-8")
            return
        cookie = f"{_COOKIE}={self._pass.decode()}; Path=/; HttpOnly; SameSite=Strict".encode()
        await _answer(send, 303, b"", "text/plain", [(b"set-cookie", cookie), (b"location", b"/")])


def _equal(given: str, wanted: bytes) -> bool:
    """In a time that tells nothing of how far they agree."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted)


async def _refuse(scope: Scope, send: Send, status: int, body: bytes, kind: str = "text/plain") -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _answer(send, status, body, kind)


async def _answer(
    send: Send, status: int, body: bytes, kind: str, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", kind.encode()), (b"cache-control", b"no-store"), *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
