"""One machine at a time makes an artifact, of all that see its storage; no clocks are compared.

Claims are numbered files, each made by a conditional write, so that of two machines one has the next number.
The highest one holds, and says so anew every few seconds. A claim that has not changed for a while, by the clock of
whoever waits, is of a machine that died, and the next number is taken. One of the same home folder needs no wait:
`infra/locks.py` lets one process of it through.

A machine that was frozen for longer finds its claim passed when it wakes, and leaves the artifact
to the other: before it writes or deletes a file it knows from its own clock, or looks, that the
claim is still its own (:meth:`Claim.check`), so that all of the other's stay. A virtual machine
that its host stopped may know it wrongly for a minute, as its clock stood still, too.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from configs.errors import UserError
from infra import logs
from infra.artifacts import CLAIMS, Artifact
from infra.home import home
from infra.storage import Storage

EVERY = 10.0
"""Seconds between two signs of life, and between two looks at somebody else's."""
STALE = 120.0
"""Seconds without one after which a claim is of the dead: longer than an outage is waited for."""


class TakenOver(UserError):
    """Another machine makes the artifact now."""


@dataclass
class Claim:
    """A right to make an artifact, while :meth:`held`."""

    storage: Storage
    number: int
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0
    _last_look: tuple[float, int] | None = field(default=None, init=False, repr=False, compare=False)
    """When the claim was last looked at, and the beats that it had."""
    _sure_until: float = field(default=0.0, init=False, repr=False, compare=False)
    """Up to then nobody can have taken the artifact over."""

    def __getstate__(self) -> dict[str, Any]:
        """Without what this machine's clock says, which means nothing elsewhere."""
        return self.__dict__ | {"_last_look": None, "_sure_until": 0.0}

    @property
    def name(self) -> str:
        return f"{CLAIMS}{self.number:06d}.json"

    def text(self) -> bytes:
        return json.dumps({"home": _home(), "token": self.token, "beats": self.beats}).encode()

    def held(self) -> bool:
        """Whether nobody took the artifact over meanwhile. Raises UserError where the storage cannot be read."""
        return self._beats_there() is not None

    def check(self) -> None:
        """Raises TakenOver where what is written from now on would be among another machine's files.

        Beats that have changed since the last look were written after it, so nobody takes over until :data:`STALE`
        after that look. Half of this is left to the write; in the other half storage is not asked again.
        """
        now = _clock()
        if now < self._sure_until:
            return
        beats = self._beats_there()
        if beats is None:
            raise TakenOver(f"{self.storage.url} was taken over by another machine, for this one was silent")
        if self._last_look is not None and beats != self._last_look[1]:
            self._sure_until = self._last_look[0] + STALE / 2
        self._last_look = now, beats

    def _beats_there(self) -> int | None:
        """The beats of this claim on the storage; None where it is another's, or no more."""
        if _newest(self.storage) != self.number:
            return None
        try:  # once an artifact is complete, claims are gone
            there = json.loads(self.storage.read_bytes(self.name))
        except FileNotFoundError:
            return None
        return int(there["beats"]) if there["token"] == self.token else None

    def keep(self, until: threading.Event) -> None:
        """Say every few seconds that its holder lives."""
        while not until.wait(EVERY):
            self.beats += 1
            with suppress(Exception):  # an outage, or what a client of storage raises: it goes on
                if not self.held():  # by its token: numbers begin again
                    return
                self.storage.write_bytes(self.name, self.text())


def _clock() -> float:
    """Seconds that go on while this machine sleeps, where its system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@contextmanager
def claimed(artifact: Artifact, done: Callable[[], bool]) -> Iterator[Claim | None]:
    """The claim to an artifact, once no other machine makes it; None where it was made meanwhile.

    Args:
        done: whether there is nothing left to make.
    """
    claim = _taken(artifact, done)
    if claim is None:
        yield None
        return
    ended = threading.Event()
    keeper = threading.Thread(target=claim.keep, args=(ended,), daemon=True, name="claim")
    keeper.start()
    try:
        yield claim
    finally:
        ended.set()
        keeper.join(timeout=EVERY)
        with suppress(Exception):  # a claim that stays is taken for dead in time
            if claim.held():
                claim.storage.delete(CLAIMS.rstrip("/"))


def _taken(artifact: Artifact, done: Callable[[], bool]) -> Claim | None:
    seen: tuple[int, bytes] | None = None
    since, told = time.monotonic(), False
    while True:
        number = _newest(artifact.storage)
        try:
            text = artifact.storage.read_bytes(Claim(artifact.storage, number).name) if number else b""
        except FileNotFoundError:  # let go between the two looks
            continue
        if (number, text) != seen:
            seen, since = (number, text), time.monotonic()
        if not number or _ours(text) or time.monotonic() - since > STALE:
            claim = Claim(artifact.storage, number + 1)
            if artifact.storage.create_bytes(claim.name, claim.text()):
                return claim
            continue
        if not told:
            logs.say(f"another machine makes {artifact.uri}: waiting for it", "warning")
        told = True
        time.sleep(EVERY / 4)
        if done():
            return None


def _newest(storage: Storage) -> int:
    """Number of the newest claim; 0 where there is none."""
    names = [name.removeprefix(CLAIMS).removesuffix(".json") for name in storage.names(CLAIMS.rstrip("/"))]
    return max((int(name) for name in names if name.isdigit()), default=0)


def _ours(text: bytes) -> bool:
    """Whether a claim is of this home folder; one that cannot be read is nobody's."""
    try:
        return bool(json.loads(text)["home"] == _home())
    except (ValueError, KeyError, TypeError):
        return False


def _home() -> str:
    """A name of this home folder that no other machine's has."""
    place = Storage.at(str(home()))
    if not place.exists("id"):
        place.create_bytes("id", uuid.uuid4().hex.encode())
    return place.read_bytes("id").decode()
