"""Which errors of storage pass by themselves, and how long one that is away is waited for."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from infra import logs
from infra.metrics import count

T = TypeVar("T")

_PATIENCE, _UNTOLD, _LONGEST_WAIT = 75.0, 2.0, 5.0
"""Seconds that a storage which has answered is waited for, without a word, and between two attempts."""
_ATTEMPTS = 5
_FIRST_WAIT = 0.1
"""Seconds, doubled at every attempt and spread by a random factor: 1.5 s for the first attempts together."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
"""Errors that another attempt would only meet again."""
_LASTING = (errno.EINVAL, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT)
"""Numbers of errors that somebody must mend: wrong names, and no room."""
_answered: set[str] = set()
"""Storages, by scheme and bucket, that this process has heard from."""
_away: set[str] = set()
"""Of them, those that it has said to be out of reach."""
_telling = threading.Lock()


def retried(place: str, request: Callable[[], T]) -> T:
    """Make a request to a remote storage, again after transient errors, waiting twice as long each time.

    One that has answered this process before is waited for through an outage of a minute, told in one line; any other
    for two seconds, as its address may be wrong.

    place: its scheme and bucket.
    """
    began, attempt = time.monotonic(), 0
    while True:
        try:
            result = request()
        except _FINAL:
            _answered.add(place)
            raise
        except errors() as error:
            outage = place in _answered and passing(error)
            patience = _PATIENCE if outage else _FIRST_WAIT * 2 ** (_ATTEMPTS - 1)
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) * (0.5 + random.random())
            if outage and time.monotonic() - began > _UNTOLD:
                _tell(place, f"{place} does not answer ({short(error)}): trying for {patience:.0f} s", "warning")
            if time.monotonic() + wait > began + patience and attempt + 1 >= _ATTEMPTS:
                raise
            attempt += 1
            count("latentforge_retries", 1, what="storage")
            time.sleep(wait)
        else:
            _answered.add(place)
            if place in _away:
                _tell(place, f"{place} answers again")
            return result


def _tell(place: str, message: str, level: str = "info") -> None:
    """Say once that a storage is away, and once that it is back, whichever thread meets it first."""
    with _telling:
        if (place in _away) == (level == "warning"):
            return
        (_away.add if level == "warning" else _away.discard)(place)
    logs.say(message, level)


def passing(error: Exception) -> bool:
    """Whether the same request may go well in a while, without anybody mending something."""
    from botocore.exceptions import NoCredentialsError, PartialCredentialsError

    lasting = (*_FINAL, NoCredentialsError, PartialCredentialsError)
    return not isinstance(error, lasting) and getattr(error, "errno", None) not in _LASTING


def errors() -> tuple[type[Exception], ...]:
    """What clients of storage raise: of connections, and of answers that are cut short."""
    from botocore.exceptions import BotoCoreError
    from botocore.parsers import ResponseParserError

    try:
        from aiohttp import ClientError
    except ImportError:
        return OSError, BotoCoreError, ResponseParserError
    return OSError, BotoCoreError, ResponseParserError, ClientError


def short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
