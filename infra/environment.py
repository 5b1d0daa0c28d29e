"""What people's shells, containers and home folders bring along, looked at before anything starts.

Every check is small, asks one thing and names the variable or folder to mend. All run at once, so that the slowest
decides how long a command waits: a few seconds where something does not answer, nothing to speak of elsewhere.
"""

from __future__ import annotations

import errno
import os
import queue
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from configs.errors import UserError
from infra import databases, locks, machine, proxies, reach, servers
from infra.home import HOME, home

SECONDS = 11.0
"""How long all checks together may take."""
_SOCKET = len("/ray/session_2026-11-26_16-38-44_123456_1234567/sockets/plasma_store")
_SOCKET_MOST = 107 if os.uname().sysname == "Linux" else 103
"""Bytes of a path that the system allows for a socket, and how many of them Ray takes below its temporary folder."""
_SHARED_MEMORY = 512 * 2**20
_FOR_DOCTOR = ("proxies",)
"""Checks of what a run may do without: whatever needs it tells then."""
_LITTLE_DISK = 2 * 2**30


class Note(Exception):
    """Something that does not hinder a run, and that its reader should know."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    level: Literal["fine", "note", "refused"]
    text: str


Check = Callable[[], str]
"""Returns what is there; raises UserError where a run would fail for it, Note where it would only be slower."""


def checks() -> dict[str, Check]:
    """Every check by its name; for those that need no Ray of this machine's, RAY_ADDRESS or the Jobs API stand."""
    jobs = bool(os.environ.get(servers.JOBS))
    local = not servers.elsewhere()
    found: dict[str, Check] = {
        "home": check_home,
        "temporary folder": lambda: check_temporary(local),
        "Prefect": _prefect(),
        "MLflow": check_mlflow,
        "disk": check_disk,
    }
    if not jobs:
        found["Ray"] = lambda: servers.check_ray(os.environ.get(servers.RAY))
    if local:
        found["shared memory"] = check_shared_memory
    if proxies.named():
        found["proxies"] = check_proxies
    return found


def look(wanted: Mapping[str, Check] | None = None, seconds: float = SECONDS) -> list[Finding]:
    """Run the checks side by side; one that does not end in time is told as such."""
    wanted = checks() if wanted is None else wanted
    done: queue.Queue[Finding] = queue.Queue()
    for name, check in wanted.items():  # daemons: a name server that never answers must not hold the command's end
        threading.Thread(target=lambda n=name, c=check: done.put(_one(n, c)), daemon=True).start()  # type: ignore[misc]
    found: dict[str, Finding] = {}
    until = time.monotonic() + seconds
    while len(found) < len(wanted):
        try:
            finding = done.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            break
        found[finding.name] = finding
    late = "did not answer within {:.0f} s: check its variables with `latentforge doctor`"
    return [found.get(name) or Finding(name, "refused", f"{name} {late.format(seconds)}") for name in wanted]


def require(*names: str) -> list[Finding]:
    """Refuse an environment in which a run would fail; gives what there is to note.

    Args:
        names: of the checks to make; none makes all.

    Raises:
        UserError: all that is wrong, a line each.
    """
    wanted = {name: check for name, check in checks().items() if not names or name in names}
    found = look({name: check for name, check in wanted.items() if name not in _FOR_DOCTOR})
    refused = [finding.text for finding in found if finding.level == "refused"]
    if "home" in {finding.name for finding in found if finding.level == "refused"}:
        refused = refused[:1]  # whatever else is wrong in it follows from that
    if refused:
        raise UserError("\nerror: ".join(refused))
    return [finding for finding in found if finding.level == "note"]


# ------------------------------------------------------------------------------------------------- what is checked


def check_home() -> str:
    """Whether the home folder takes files, and locks, by which commands that share it wait."""
    folder = home()
    _write_to(folder, f"the home folder {folder}", f"set {HOME} to a folder where you may write")
    try:
        locks.held("the home folder")
    except OSError as error:
        raise UserError(
            f"the home folder {folder} is on a disk without locks ({error.strerror}): set {HOME} to "
            "a folder on a disk of this machine"
        ) from None
    return str(folder)


def check_temporary(local_ray: bool) -> str:
    """Whether temporary files can be written, and, for a Ray of this machine's, whether its sockets' paths fit."""
    names = ("RAY_TMPDIR", "TMPDIR") if local_ray else ("TMPDIR",)
    for name in names:
        folder = os.environ.get(name)
        if folder and not Path(folder).is_dir():
            raise UserError(f"{name} is {folder}, which is no folder: make it, or unset {name}")
    folder = tempfile.gettempdir()
    _write_to(Path(folder), f"the temporary folder {folder}", "set TMPDIR to a folder where you may write")
    if local_ray:
        name, rays = next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("TMPDIR", "/tmp"))
        most = _SOCKET_MOST - _SOCKET
        if len(os.fsencode(rays)) > most:
            raise UserError(
                f"{name} is {rays}, {len(os.fsencode(rays))} characters long, and the paths of Ray's sockets leave "
                f"room for {most}: set RAY_TMPDIR to a shorter folder, for example /tmp"
            )
    return folder


def _prefect() -> Check:
    """The check of Prefect. Its settings are read here, as their import must not count as waiting."""
    folder = os.environ.get("PREFECT_HOME", "")
    try:
        if folder and Path(folder).exists() and not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return partial(check_prefect, *_prefect_settings())
    except OSError as error:
        place = folder or "~/.prefect"
        return partial(_refuse, f"PREFECT_HOME is {place}, which cannot be used ({error.strerror}): set it elsewhere")


def _refuse(text: str) -> str:
    raise UserError(text)


def check_prefect(url: str | None, base: Path | None) -> str:
    """The server that is named, else the database that a temporary one would open."""
    said = servers.check_prefect(url)
    if not url and base is not None:
        databases.check(base, databases.PREFECT, "PREFECT_HOME")
    return said


def check_mlflow() -> str:
    """The server or database that is named."""
    uri = os.environ.get(servers.MLFLOW)
    said = servers.check_mlflow(uri)
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri and uri.startswith("sqlite:///") else None
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{servers.MLFLOW} is {uri}, and there is no folder {path.parent}: make it, or unset it")
    if path is not None or not uri:
        databases.check(path or home() / "mlflow.db", databases.MLFLOW, servers.MLFLOW)
    return said


def check_disk() -> str:
    """Room in the home folder, where everything goes that names no other place."""
    left = machine.free(home())
    if left is not None and left < _LITTLE_DISK:
        raise Note(f"only {machine.size(left)} are left on the disk of {home()}: set {HOME} to a larger one")
    return f"{machine.size(left)} left for {home()}"


def check_proxies() -> str:
    """Whether those that the environment names answer. A run that fetches nothing goes well without."""
    silent = [said for name in proxies.named() if (said := reach.proxy_silent(name)) is not None]
    if silent:
        raise Note(f"{silent[0]}: nothing from outside can be fetched; mend or unset {' and '.join(proxies.named())}")
    return " and ".join(proxies.named())


def check_shared_memory(folder: Path = Path("/dev/shm")) -> str:
    """Where a Ray of this machine's keeps what stages hand on."""
    if not folder.is_dir():
        return "none on this system"
    left = machine.free(folder)
    if left is not None and left < _SHARED_MEMORY:
        raise Note(
            f"{folder} has {machine.size(left)} left, so Ray keeps its objects on disk, which is slower: start the "
            "container with --shm-size=4g, or more"
        )
    return f"{machine.size(left)} left"


def _prefect_settings() -> tuple[str | None, Path | None]:
    """The API that Prefect's variables, files and profiles name, and the SQLite file of a server without one."""
    with suppress(UserError):  # the check of the home folder tells
        home()  # before Prefect makes its own in it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from prefect.settings import get_current_settings

    settings = get_current_settings()
    url, connection = os.environ.get(servers.PREFECT) or settings.api.url, settings.server.database.connection_url
    text = connection.get_secret_value() if connection is not None else ""
    if text and not text.startswith("sqlite"):
        return url, None
    path = text.partition(":///")[2].partition("?")[0]
    return url, Path(path) if path else Path(os.environ.get("PREFECT_HOME") or settings.home) / "prefect.db"


def _write_to(folder: Path, what: str, way_out: str) -> None:
    file = folder / f".{uuid.uuid4().hex[:8]}.check"
    try:
        file.write_bytes(b"1")
        file.unlink()
    except OSError as error:
        raise UserError(f"{what} takes no files ({error.strerror}): {way_out}") from None


def _one(name: str, check: Check) -> Finding:
    try:
        return Finding(name, "fine", check())
    except Note as note:
        return Finding(name, "note", str(note))
    except UserError as error:
        return Finding(name, "refused", str(error))
    except Exception as error:  # a check that fails itself must not stand in a run's way
        return Finding(name, "note", f"could not be checked ({type(error).__name__}: {str(error)[:200]})")
