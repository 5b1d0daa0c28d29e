"""Debian's Chromium without a window, driven over its DevTools protocol: what a person does in a page."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE = 60.0


def program() -> str | None:
    """Where a browser is; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One open page."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._number = socket, 0
        self.errors: list[str] = []
        """What the page's scripts threw."""
        for domain in ("Page", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **given: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": given}))
        while True:
            told = json.loads(self._socket.recv(timeout=_PATIENCE))
            if told.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(told["params"]["exceptionDetails"])[:500])
            if told.get("id") == self._number:
                if "error" in told:
                    raise AssertionError(f"{method}: {told['error']}")
                found: dict[str, Any] = told["result"]
                return found

    def go(self, url: str) -> None:
        self.ask("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def value(self, script: str) -> Any:
        """What a JavaScript expression says."""
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def wait(self, script: str, seconds: float = _PATIENCE) -> Any:
        """What an expression says once that is true of it; of what is found in the page, that it is there."""
        asked = f"(found => found instanceof Node || found)({script})"
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(AssertionError):  # while a page is being left
                if found := self.value(asked):
                    return found
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds:.0f} s: {script}\n{self.text()[:3000]}\n{self.errors}")

    def text(self) -> str:
        return str(self.value("document.body ? document.body.innerText : ''"))

    def click(self, text: str, kind: str = "button, .q-tab, a, label") -> None:
        """Click on what is visible and says this."""
        self.wait(
            f"(() => {{ const found = [...document.querySelectorAll({kind!r})].find(e => e.offsetParent && "
            f"e.innerText.trim() == {text!r}); if (found) found.click(); return !!found }})()"
        )

    def fill(self, label: str, text: str) -> None:
        """Type into the visible field of this label, in place of what it holds, and leave it."""
        self.wait(
            f"(() => {{ const found = [...document.querySelectorAll('input')].find(e => e.offsetParent && "
            f"e.getAttribute('aria-label') == {label!r}); if (found) {{ found.focus(); found.select() }} "
            "return !!found })()"
        )
        self.ask("Input.insertText", text=text)
        self.value("document.activeElement.blur()")

    def give(self, file: Path) -> None:
        """Choose a file in the page's field for one."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        found = self.ask("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=found, files=[str(file)])

    def shot(self, file: Path) -> None:
        found = self.ask("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browsing(width: int = 1280, height: int = 800) -> Iterator[Page]:
    """A fresh browser with one page while this lasts."""
    chromium = program()
    assert chromium is not None
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run")
        command = [chromium, *options, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_address(Path(folder) / "DevToolsActivePort"), max_size=None, proxy=None) as socket:
                page = Page(socket)
                page.ask(
                    "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                )
                yield page
        finally:
            process.terminate()
            process.wait()


def _address(file: Path) -> str:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        with suppress(OSError, IndexError, ValueError):
            port = file.read_text().split()[0]
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"http://127.0.0.1:{port}/json"
            ) as told:
                pages = [each for each in json.load(told) if each["type"] == "page"]
            return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError("the browser does not answer")
