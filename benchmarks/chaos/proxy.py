"""A TCP proxy on loopback whose weather can be changed: what an outage, a bad link or a full disk looks like."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

WEATHERS = ("fair", "cut", "short", "slow", "full")
"""As ever; nobody answers; answers end halfway; every answer waits; writes are refused for want of room."""
SLOW = 1.5
"""Seconds that a slow answer waits."""
_FULL = b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_BLOCK = 1 << 16


class Proxy:
    """Passes bytes between its own port and a server's."""

    def __init__(self, port: int) -> None:
        self.server = port
        self.port = 0
        self.weather = "fair"
        self.written: list[tuple[float, str]] = []
        """When each file was written, and its path."""

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its address, as `host:port`."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True, name=f"proxy of {self.server}")
        thread.start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), loop).result()
        self.port = listening.sockets[0].getsockname()[1]
        try:
            yield f"127.0.0.1:{self.port}"
        finally:
            asyncio.run_coroutine_threadsafe(_end_others(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.weather == "cut":
            writer.transport.abort()
            return
        try:
            above, below = await asyncio.open_connection("127.0.0.1", self.server)
        except OSError:
            writer.transport.abort()
            return
        ways = [asyncio.ensure_future(self._asked(reader, below, writer))]
        ways.append(asyncio.ensure_future(self._answered(above, writer)))
        with suppress(asyncio.CancelledError):  # the proxy ends
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (writer, below):
            with suppress(OSError):
                end.close()

    async def _asked(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_BLOCK):
                if self.weather == "cut":
                    client.transport.abort()
                    return
                if put := re.match(rb"PUT ([^ ?]+)", data):
                    if self.weather == "full":
                        client.write(_FULL)
                        await client.drain()
                        return
                    self.written.append((time.monotonic(), put[1].decode()))
                server.write(data)
                await server.drain()

    async def _answered(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await server.read(_BLOCK):
                if self.weather == "cut":
                    client.transport.abort()
                    return
                if self.weather == "slow":
                    await asyncio.sleep(SLOW)
                if self.weather == "short" and (cut := _middle(data)):
                    client.write(data[:cut])
                    await client.drain()
                    return
                client.write(data)
                await client.drain()


async def _end_others() -> None:
    """End what still passes bytes, so that a loop without work is stopped."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for each in others:
        each.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _middle(data: bytes) -> int:
    """The middle of what these bytes have of an answer's body; 0 where that is nothing."""
    begin = data.find(b"\r\n\r\n") + 4 if data.startswith(b"HTTP/") else 0
    return begin + (len(data) - begin) // 2 if len(data) > begin + 1 else 0
