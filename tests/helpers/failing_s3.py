"""A proxy before an S3 server that fails requests by rule: what a bad day of object storage looks like."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class FailingS3:
    """Passes requests on, but those for which `fails(number, method, path)`, counted from 1."""

    def __init__(self, endpoint: str, fails: Callable[[int, str, str], bool]) -> None:
        self.server, self.fails = urlsplit(endpoint).netloc, fails
        self.requests = self.failed = 0
        self.listed: list[str] = []
        """What listings asked for."""
        self._lock = threading.Lock()

    def refuses(self, method: str, path: str) -> bool:
        with self._lock:
            self.requests += 1
            if method == "GET" and "list-type" in path:
                self.listed += parse_qs(urlsplit(path).query).get("prefix", [""])
            failing = self.fails(self.requests, method, path)
            self.failed += failing
        return failing

    @contextmanager
    def running(self) -> Iterator[str]:
        """Its endpoint."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.refuses(self.command, self.path):
                    if proxy.failed % 2:
                        self.send_error(503, "Slow Down")
                    self.close_connection = True  # every other time without a word
                    return
                upstream = http.client.HTTPConnection(proxy.server)
                headers = {name: value for name, value in self.headers.items() if name != "Expect"}
                upstream.request(self.command, self.path, body or None, headers)
                answer = upstream.getresponse()
                content = answer.read()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                self.wfile.write(content)
                upstream.close()

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # names that http.server looks for

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
