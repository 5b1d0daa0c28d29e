"""`latentforge studio` over a root, as a command of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.conftest import free_port
from tests.flows.conftest import REPOSITORY

PICTURE = "[...document.querySelectorAll('img')].find(e => e.offsetParent && e.src.startsWith('data:'))"
"""The first picture that is seen."""
LINE = "[...document.querySelectorAll('[role=alert]')].find(e => e.offsetParent && e.innerText)"
"""What a tab says is wrong."""


@contextmanager
def studio(environment: Mapping[str, str], root: str) -> Iterator[str]:
    """Its address, while it runs."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    with subprocess.Popen(
        [sys.executable, "-m", "flows", "studio", "--root", root, "--port", str(port)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
    ) as process:
        try:
            patience = time.monotonic() + 120
            while not _answers(address):
                assert process.poll() is None and time.monotonic() < patience, "it does not answer"
                time.sleep(0.2)
            yield address
            assert process.poll() is None, "it did not outlive what was done to it"
        finally:
            process.terminate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
