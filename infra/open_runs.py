"""Flow runs that are under way on this machine, so that what the dead leave open is closed by the next.

Each has a file in the home folder, locked by its process while that lives. A file that nobody locks belongs to a
process that was killed: its flow run is told to Prefect as crashed, and its runs to MLflow as failed; or as cancelled
and killed, where it was asked to stop and had no time to say so.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from infra import logs
from infra.home import home
from infra.tracking import Tracker

_mine: dict[Path, OpenRun] = {}
"""Of this process."""


@dataclass(frozen=True)
class OpenRun:
    """What has to be closed."""

    flow_run: str = ""
    """Prefect's id; empty without Prefect."""
    api: str = ""
    """Prefect's API that knows it; empty for the temporary server of a command."""
    uri: str = ""
    run: str = ""
    """MLflow's, the parent of its stages'."""
    jobs: bool = False
    """Whether its stages go on by themselves, as jobs of a cluster."""
    cancelled: bool = False


@contextmanager
def listed(opened: OpenRun) -> Iterator[None]:
    """The run is listed as this process's while this lasts."""
    path = _folder() / f"{opened.flow_run or uuid.uuid4()}.json"
    with _locked(path) as file:
        _write(file, opened)
        _mine[path] = opened
        try:
            yield
        finally:
            _mine.pop(path, None)
            path.unlink(missing_ok=True)


def note_cancelled() -> None:
    """Say of this process's runs that they were asked to stop, for whoever closes them."""
    for path, opened in list(_mine.items()):
        with suppress(OSError):
            path.write_text(json.dumps({**asdict(opened), "cancelled": True}))


def living() -> dict[str, bool]:
    """MLflow's runs that this machine's processes opened, and whether each still is its process's. Changes nothing."""
    found: dict[str, bool] = {}
    for path in sorted(_folder().glob("*.json")):
        with suppress(OSError, ValueError, TypeError), path.open() as file:  # it ends, or is being written
            opened = OpenRun(**json.loads(file.read()))
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found[opened.run] = False
            except BlockingIOError:
                found[opened.run] = True
    return found


def close_abandoned(current: str = "") -> int:
    """Close what processes that are gone left open; how many runs.

    What cannot be reached now stays for later.

    current: Prefect's id of the flow run that this process works at. Where Prefect began it again
        after its process died, what that one left in MLflow is closed, and the flow run goes on.
    """
    closed = 0
    for path in sorted(_folder().glob("*.json")):
        with suppress(OSError), path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            try:
                opened = OpenRun(**json.loads(file.read()))
            except (ValueError, TypeError):  # its process died while it wrote
                path.unlink(missing_ok=True)
                continue
            try:
                _close(opened, current)
            except Exception as error:  # a server that is away must not keep another run from starting
                logs.say(f"an earlier run cannot be closed yet ({type(error).__name__}): {path.stem}", "warning")
                continue
            path.unlink(missing_ok=True)
            closed += 1
    return closed


def _folder() -> Path:
    folder = home() / "open"
    folder.mkdir(exist_ok=True)
    return folder


def _locked(path: Path) -> IO[str]:
    """The file of this name, locked; anew where it was taken for abandoned before it was."""
    while True:
        file = path.open("a+")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def _write(file: IO[str], opened: OpenRun) -> None:
    file.truncate(0)
    file.write(json.dumps(asdict(opened)))
    file.flush()


def _close(opened: OpenRun, current: str) -> None:
    if opened.run:
        _close_mlflow(opened)
    if opened.flow_run and opened.flow_run != current:
        _close_prefect(opened)


def _close_mlflow(opened: OpenRun) -> None:
    from mlflow.exceptions import MlflowException

    status = "KILLED" if opened.cancelled else "FAILED"
    tracker = Tracker(opened.uri, opened.run)
    try:
        children = [] if opened.jobs else tracker.running_children()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return
        raise
    for run in [*children, tracker]:
        run.finish(status)


def _close_prefect(opened: OpenRun) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Cancelled, Crashed

    state: Any = Cancelled if opened.cancelled else Crashed
    message = "It was asked to stop." if opened.cancelled else "Its process ended without a word."
    given: dict[Any, Any] = {PREFECT_API_URL: opened.api} if opened.api else {}
    with suppress(ObjectNotFound), temporary_settings(given), get_client(sync_client=True) as client:
        found = client.read_flow_run(uuid.UUID(opened.flow_run))
        if found.state is None or not found.state.is_final():
            client.set_flow_run_state(found.id, state(message=message), force=True)
