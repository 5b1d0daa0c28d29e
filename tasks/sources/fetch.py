"""Fetching Fashion-MNIST: Debian's package where apt works, else the public downloads; checked, then moved in whole."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path

from configs.errors import UserError, brief
from infra import reach

PACKAGE = "dataset-fashion-mnist"
URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
)
_SECONDS = 120
_APT = ("-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=10", "-o", "Acquire::https::Timeout=10")
_APT_ASKS = "http://deb.debian.org"


def fetch_fashion_mnist(target: Path, trailers: Mapping[str, str]) -> None:
    """Put the four files into `target`, which appears only whole; several processes may try at once.

    Args:
        trailers: file names with the CRC-32 and length of their content, 16 hex digits as gzip stores them.

    Raises:
        UserError: no way worked; says what each met and what to do.
    """
    refused = reach.proxy_refusals((_APT_ASKS, *URLS))
    if len(refused) == 1 + len(URLS):  # at once: each way would try again and again
        raise UserError(
            f"Fashion-MNIST is not on this machine and cannot be fetched: {next(iter(refused.values()))}; or name a "
            "folder with its four .gz files in LATENTFORGE_FASHION_MNIST or data.source.path"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fashion-MNIST: not on this machine yet, fetching 31 MB into {target}", file=sys.stderr, flush=True)
    met: list[str] = []
    ways = {_APT_ASKS: _from_debian, **{url: _from(url) for url in URLS}}
    for fetch in (way for url, way in ways.items() if url not in refused):
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
            try:
                found = fetch(Path(scratch), list(trailers))
                for name, trailer in trailers.items():
                    _check(found / name, trailer)
            except (OSError, subprocess.SubprocessError, EOFError, zlib.error, ValueError) as error:
                met.append(f"{fetch.__doc__}: {brief(error, 160)}")
                continue
            _move_in(found, list(trailers), target)
            return
    raise UserError(
        f"Fashion-MNIST could not be fetched ({'; '.join(met)}). Install Debian's package {PACKAGE}, or download the "
        "four .gz files elsewhere and name their folder in LATENTFORGE_FASHION_MNIST or data.source.path"
    )


def _from_debian(scratch: Path, names: list[str]) -> Path:
    """apt"""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise FileNotFoundError("no apt on this machine")
    try:
        _command(["apt-get", *_APT, "download", PACKAGE], scratch)
    except subprocess.SubprocessError:  # no package lists yet: use lists of our own, which needs no root
        for folder in ("lists/partial", "cache/archives/partial"):
            (scratch / folder).mkdir(parents=True)
        own = [*_APT, "-o", f"Dir::State::Lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch / 'cache'}"]
        _command(["apt-get", *own, "update"], scratch)
        _command(["apt-get", *own, "download", PACKAGE], scratch)
    package = next(scratch.glob(f"{PACKAGE}*.deb"))
    _command(["dpkg-deb", "-x", str(package), "unpacked"], scratch)
    return next((scratch / "unpacked").rglob(names[0])).parent


def _command(arguments: list[str], folder: Path) -> None:
    done = subprocess.run(arguments, cwd=folder, timeout=_SECONDS, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise subprocess.SubprocessError(lines[-1])


def _from(url: str):  # type: ignore[no-untyped-def]
    def fetch(scratch: Path, names: list[str]) -> Path:
        for name in names:
            with urllib.request.urlopen(f"{url}/{name}", timeout=_SECONDS) as answer:
                (scratch / name).write_bytes(answer.read(64 << 20))
        return scratch

    fetch.__doc__ = url
    return fetch


def _check(path: Path, trailer: str) -> None:
    """Decompress fully (gzip checks its own CRC) and compare with the published content's."""
    content = gzip.decompress(path.read_bytes())
    found = zlib.crc32(content).to_bytes(4, "little").hex() + len(content).to_bytes(4, "little").hex()
    if found != trailer:
        raise ValueError(f"{path.name} holds other content than the published file (checksum {found})")


def _move_in(found: Path, names: list[str], target: Path) -> None:
    """Make `target` appear at once; whoever comes second finds the first one's files there."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".moving-") as scratch:
        ready = Path(scratch) / target.name
        ready.mkdir()
        for name in names:
            shutil.copy(found / name, ready / name)
        if target.exists() and not all((target / name).is_file() for name in names):
            shutil.rmtree(target)
        try:
            ready.rename(target)
        except OSError:
            if not all((target / name).is_file() for name in names):
                raise
