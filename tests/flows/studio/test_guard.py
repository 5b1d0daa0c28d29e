"""Who may come in: pages and websockets, with and without the token, and from other sites."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from configs import UserError
from flows.studio.guard import Guard
from flows.studio.serve import TOKEN, guard, token_for

SECRET = "a token of many letters"


async def open_door(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "inside"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def visitor(listen: str, token: str, base: str = "http://127.0.0.1:8090") -> TestClient:
    return TestClient(guard(open_door, token, listen), base_url=base, follow_redirects=False)


def socket_says(client: TestClient, **headers: str) -> str:
    try:
        with client.websocket_connect(f"ws://{client.base_url.netloc.decode()}/socket", headers=headers) as socket:
            return socket.receive_text()
    except (WebSocketDisconnect, WebSocketDenialResponse):
        return "refused"


def test_elsewhere_every_page_and_websocket_asks_for_the_token() -> None:
    client = visitor("10.0.0.5", SECRET, "http://10.0.0.5:8090")
    for method, path in (("GET", "/"), ("GET", "/file/report/x"), ("POST", "/"), ("DELETE", "/_nicegui/x")):
        refused = client.request(method, path)
        assert refused.status_code == 401 and "inside" not in refused.text
    assert socket_says(client) == "refused"
    assert client.get("/", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/", headers={"cookie": f"latentforge-studio={SECRET}"}).status_code == 401

    assert client.get("/", headers={"authorization": f"Bearer {SECRET}"}).text == "inside"
    assert socket_says(client, authorization=f"Bearer {SECRET}") == "inside"


def test_who_gives_the_token_once_comes_in_by_a_cookie_that_is_not_the_token() -> None:
    client = visitor("10.0.0.5", SECRET, "http://10.0.0.5:8090")
    assert client.post("/enter", data={"token": "guessed"}).status_code == 401
    entered = client.post("/enter", data={"token": SECRET})
    assert entered.status_code == 303 and entered.headers["location"] == "/"
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and SECRET not in cookie
    assert client.get("/").text == "inside" and socket_says(client) == "inside"


def test_on_loopback_no_token_is_asked_for_and_no_other_site_comes_in() -> None:
    client = visitor("127.0.0.1", "")
    assert client.get("/").text == "inside" and socket_says(client) == "inside"
    assert client.get("/", headers={"host": "rebound.example"}).status_code == 403
    for method in ("GET", "POST"):
        foreign = {"origin": "https://elsewhere.example"}
        assert client.request(method, "/", headers=foreign).status_code == 403
    assert client.post("/", headers={"origin": "null"}).status_code == 403
    assert client.get("/", headers={"host": "[::1"}).status_code == 403
    assert client.get("/", headers={"sec-fetch-dest": "iframe"}).status_code == 403
    assert client.get("/", headers={"sec-fetch-dest": "document"}).text == "inside"
    assert client.post("/", headers={"origin": "http://127.0.0.1:8090"}).text == "inside"
    assert socket_says(client, origin="https://elsewhere.example") == "refused"
    assert socket_says(client, origin="http://127.0.0.1:8090") == "inside"
    for listen, base in (("127.0.0.2", "http://127.0.0.2:8090"), ("::1", "http://[::1]:8090")):
        assert visitor(listen, "", base).get("/").text == "inside"


def test_another_address_without_a_token_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert token_for("127.0.0.1") == token_for("::1") == token_for("localhost") == ""
    with pytest.raises(UserError, match=r"studio --listen 0\.0\.0\.0: .* found none: export LATENTFORGE_STUDIO_TOKEN="):
        token_for("0.0.0.0")
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(UserError, match="found a short one") as refusal:
        token_for("127.0.0.1")
    assert "short" not in str(refusal.value).replace("a short one", "")
    monkeypatch.setenv(TOKEN, SECRET)
    assert token_for("0.0.0.0") == SECRET


def test_a_message_that_is_neither_page_nor_websocket_goes_through() -> None:
    with TestClient(Guard(lifespan_only, SECRET)):
        pass


async def lifespan_only(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
