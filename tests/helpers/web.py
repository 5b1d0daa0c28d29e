"""A web server on loopback that serves a folder, and answers badly where it is told to."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def web_server(
    folder: Path, codes: Mapping[str, int] = {}, short: Collection[str] = (), ranges: bool = True
) -> Iterator[str]:
    """Serves the files below `folder`; gives its address.

    codes: status by the name of a file. short: names of files that break off before their end.
    ranges: whether parts of files are given.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, body: bool) -> None:
            path = folder / self.path.split("?")[0].lstrip("/")
            code = codes.get(path.name, 200 if path.is_file() else 404)
            content = path.read_bytes() if code == 200 else b"no"
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
            if wanted and code == 200:
                content = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
                code = 206
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if path.name in short else content)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
