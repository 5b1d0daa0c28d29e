"""Stages as jobs of a Ray cluster, through its Jobs API: submitted once, followed, found again, stopped.

What the job does is `tasks/job.py`'s; here is the side of whoever waits for it. A job's id follows from the artifact
it makes, so that a second process finds the job of the first instead of starting its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from configs.addresses import refuse_credentials
from configs.compute import ClusterCompute
from configs.errors import UserError
from infra import logs, stopping
from infra.artifacts import Artifact
from infra.cluster import SETTINGS
from infra.entrypoint import cannot_begin, entrypoint
from infra.logs import Line

ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's own variable for the address of a Jobs API; it goes before the recipe's."""
DESCRIPTION = "job.json"
FAULT = 70
"""Exit status of a job whose stage raised what another attempt would meet again."""
STOP_SECONDS = 120
"""What a job may take to save and leave before it is killed: training writes a checkpoint."""
_CODE = {"configs", "models", "tasks", "infra", "pyproject.toml", "requirements.lock"}
"""What of the repository travels, but for what .gitignore leaves out."""
_REPOSITORY = Path(__file__).parents[1]
_TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env")
"""Ray's loggers that tell each file that is not sent."""
_LOOK_SECONDS = 2.0
_PATIENCE_SECONDS = 300.0
"""How long the Jobs API may be out of reach before whoever waits gives up; the job goes on."""
_ANSWER_SECONDS = 60.0
"""How long one request to the Jobs API may stay without an answer."""
_CHECK_SECONDS = 5.0
"""The same before a run, of whoever waits for its first word."""
_FAREWELL_SECONDS = 20.0
"""How long to wait for a stopped job; below the 30 s that Prefect gives a cancelled flow."""
_HURRIED_FAREWELL_SECONDS = 5.0
"""The same for a person who pressed Ctrl-C."""

Say = Callable[[Line], None]


class JobLost(UserError):
    """A job ended without its stage being at fault, or is out of reach: trying again may help."""


def address(compute: ClusterCompute) -> str | None:
    """Where stages go as jobs; None runs them in this process."""
    return os.environ.get(ADDRESS) or compute.jobs


def check(compute: ClusterCompute) -> None:
    """Refuse a cluster that cannot be reached, or that has another Ray, before anything starts.

    Raises:
        UserError: it does not answer, wants another token, or is of another version, or its address holds credentials.
    """
    place = address(compute)
    if place is None:
        return
    refuse_credentials(ADDRESS, place)  # a recipe's own address has none, by its form
    _variables(compute)
    _client(compute, _CHECK_SECONDS)


def run(artifact: Artifact, description: bytes, compute: ClusterCompute, say: Say) -> None:
    """Have the cluster make an artifact; returns when its job is done.

    A job that makes this artifact already is followed, whoever submitted it. An interruption of this process (Ctrl-C,
    SIGTERM, a cancelled flow) stops the job; the death of this process does not.

    Args:
        artifact: what to make.
        description: of the job for `tasks/job.py`, left beside the artifact.
        compute: which cluster, and what of this environment its job is given.
        say: takes every line that the job prints.

    Raises:
        UserError: the one that the stage raised, or the job was stopped by somebody else.
        JobLost: the job's process died, or the cluster is gone; trying again may help.
        RuntimeError: the stage raised something else; its traceback is in the job's lines.
    """
    import requests

    client = _client(compute, _ANSWER_SECONDS)
    try:
        job = _running(client, artifact)
        if job is None:
            artifact.storage.write_bytes(DESCRIPTION, description)
            job = _submit(client, artifact, compute)
            say(Line(f"submitted job {job} to {address(compute)}"))
        else:
            say(Line(f"job {job} runs already at {address(compute)}: following it"))
        details = _follow(client, job, say)
    except requests.exceptions.RequestException as error:
        raise JobLost(f"the Ray Jobs API at {address(compute)} does not answer any more: {_short(error)}") from None
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM and cancellation are no Exceptions
        _stop(client, artifact, say)
        raise
    _judge(details, job)
    artifact.storage.delete(DESCRIPTION)


def submission_id(artifact: Artifact, attempt: int) -> str:
    """A pure function of what is made, and of how often it was tried."""
    place = hashlib.sha256(artifact.root.encode()).hexdigest()[:8]
    return f"latentforge-{artifact.stage}-{artifact.fingerprint}-{place}-{attempt}"


# ------------------------------------------------------------------------------------------------------ submitting


def _client(compute: ClusterCompute, seconds: float) -> Any:
    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Whose requests end: on a connection that went silent Ray's own wait for ever."""

        patience = seconds

        def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": self.patience, **given})

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    place = address(compute)
    token = _token()
    try:
        with _environment(ADDRESS, place):  # else a RAY_ADDRESS of this process would go before
            client = Client(place, headers={"Authorization": f"Bearer {token}"} if token else None)
    except AuthenticationError:
        raise UserError(
            f"the Ray cluster at {place} wants another token: put it into ~/.ray/auth_token, or name its file in "
            "RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, requests.exceptions.RequestException, RuntimeError) as error:
        raise JobLost(
            f"no Ray Jobs API answers at {place} ({_short(error)}): check {ADDRESS} or compute.cluster.jobs, and that "
            "the cluster or the port forwarded to it is up"
        ) from None
    found = client._do_request("GET", "/api/version").json()["ray_version"]
    if found != ray.__version__:
        raise UserError(
            f"the Ray cluster at {place} has Ray {found}, and this machine {ray.__version__}: start the cluster from "
            "an image built of this requirements.lock"
        )
    return client


def _token() -> str | None:
    """As Ray looks for it. Ray itself would look only where RAY_AUTH_MODE says that there is one."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (path.read_text().strip() or None) if path.is_file() else None


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value or ""
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


def _running(client: Any, artifact: Artifact) -> str | None:
    """The job that makes the artifact now, if there is one."""
    ids = _attempts(client, artifact)
    return next((job for job, status in ids.items() if not status.is_terminal()), None)


def _attempts(client: Any, artifact: Artifact) -> dict[str, Any]:
    """Status of every job that this cluster was given for the artifact."""
    stem = submission_id(artifact, 0)[:-1]
    found = [job for job in client.list_jobs() if (job.submission_id or "").startswith(stem)]
    return {job.submission_id: job.status for job in found}


def _submit(client: Any, artifact: Artifact, compute: ClusterCompute) -> str:
    """Submit the next attempt. Where somebody else was faster, theirs is the job."""
    tried = [int(job.rpartition("-")[2]) for job in _attempts(client, artifact)]
    job = submission_id(artifact, max(tried, default=0) + 1)
    command = entrypoint("tasks.job", [artifact.root, artifact.stage, artifact.fingerprint])
    environment: dict[str, Any] = {"env_vars": _variables(compute)}
    if compute.code is not None:
        environment["working_dir"] = f"local://{compute.code}"
    elif (_REPOSITORY / "requirements.lock").is_file():  # else the code is installed, there as here
        environment |= {"working_dir": str(_REPOSITORY), "excludes": _excludes(_REPOSITORY)}
    metadata = {"stage": artifact.stage, "fingerprint": artifact.fingerprint, "artifact": artifact.uri}
    try:
        client.submit_job(
            entrypoint=command,
            submission_id=job,
            runtime_env=environment,
            metadata=metadata,
        )
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise JobLost(f"the cluster did not take job {job}: {_short(error)}") from None
    return job


def _excludes(folder: Path) -> list[str]:
    """Everything beside the code, in .gitignore's words: people keep images and runs there."""
    others = [path.name for path in folder.iterdir() if path.name not in _CODE]
    return ["/" + re.sub(r"([\\*?\[!#])", r"\\\1", name) for name in sorted(others)]


def _variables(compute: ClusterCompute) -> dict[str, str]:
    """The environment of a job: ours, and what the recipe names of this process's. Ray's dashboard shows it."""
    missing = [name for name in compute.environment if name not in os.environ]
    if missing:
        raise UserError(f"compute.cluster.environment names {', '.join(missing)}, which is not set here: set it")
    ours = {logs.FORMAT: "json", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **SETTINGS}
    return {**ours, **{name: os.environ[name] for name in compute.environment}}


# ------------------------------------------------------------------------------------------------------- following


def _follow(client: Any, job: str, say: Say) -> Any:
    """Give every line to `say` until the job ends; its details."""
    tail = _Tail(client, job)
    try:
        unseen_since: float | None = None
        while True:
            tail.pass_on(say, _LOOK_SECONDS)
            try:
                details = client.get_job_info(job)
                unseen_since = None
            except Exception as error:  # the head restarts, a forwarded port broke
                unseen_since = unseen_since or time.monotonic()
                if time.monotonic() - unseen_since > _PATIENCE_SECONDS or "status code 404" in str(error):
                    raise JobLost(f"job {job} is out of reach: {_short(error)}") from None
                continue
            if details.status.is_terminal():
                tail.finish(say)
                return details
    finally:
        tail.leave()


class _Tail:
    """A job's output, line by line, read by a thread so that signals reach the thread that waits."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job = client, job
        self._lines: queue.Queue[str] = queue.Queue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def pass_on(self, say: Say, seconds: float) -> None:
        """What comes within so many seconds."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            with suppress(queue.Empty):
                say(logs.read(self._lines.get(timeout=left)))

    def finish(self, say: Say) -> None:
        """The rest, once the job is over."""
        until = time.monotonic() + 10.0
        while self._thread.is_alive() and time.monotonic() < until:
            self.pass_on(say, 0.2)
        while not self._lines.empty():
            say(logs.read(self._lines.get()))

    def leave(self) -> None:
        self._over.set()

    def _read(self) -> None:
        import asyncio

        seen = 0
        while not self._over.is_set():
            with suppress(Exception):  # a broken connection: the next one begins at the start again
                seen, ended = asyncio.run(self._once(seen))
                if ended:
                    return
            self._over.wait(_LOOK_SECONDS)

    async def _once(self, skip: int) -> tuple[int, bool]:
        """Read from the start, leaving out what was seen; characters seen now, and whether it was the end."""
        seen, rest = 0, ""
        try:
            async for chunk in self._client.tail_job_logs(self._job):
                if self._over.is_set():
                    return seen, True
                fresh = chunk[max(0, skip - seen) :] if seen < skip else chunk
                seen += len(chunk)
                *whole, rest = (rest + fresh).split("\n")
                for line in whole:
                    self._put(line)
        except Exception:
            return max(skip, seen - len(rest)), False
        self._put(rest)
        return seen, True

    def _put(self, line: str) -> None:
        if line.strip():
            self._lines.put(line)


def _stop(client: Any, artifact: Artifact, say: Say) -> None:
    until = time.monotonic() + (_HURRIED_FAREWELL_SECONDS if stopping.asked() else _FAREWELL_SECONDS)
    job: str | None = submission_id(artifact, 0)[:-1] + "…"
    client.patience = _FAREWELL_SECONDS / 4
    try:
        job = _running(client, artifact)
        if job is None:
            return
        say(Line(f"stopping job {job}", "warning"))
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > until:
                say(Line(f"job {job} is still saving; the cluster ends it within {STOP_SECONDS} s", "warning"))
                return
            time.sleep(0.5)
        say(Line(f"stopped job {job}", "warning"))
    except Exception as error:  # the interruption itself must reach whoever sent it
        with suppress(Exception):
            say(Line(f"cannot tell job {job} to stop ({_short(error)}): `ray job stop` ends it", "error"))


def _judge(details: Any, job: str) -> None:
    """Return where the job did what it should; else raise what it means."""
    status, message = str(getattr(details.status, "value", details.status)), details.message or ""
    if status == "SUCCEEDED":
        return
    if status == "STOPPED":
        raise UserError(f"job {job} was stopped on the cluster: run again to go on")
    lines = [logs.read(text) for text in message.splitlines()]
    for line in lines:
        if line.fields.get("mistake"):
            raise UserError(line.message)
    told = [line.message for line in lines if line.level == "error"]
    reason = _short(told[-1] if told else message)  # else Ray's own words, with the last lines
    if cannot_begin(details.driver_exit_code, message):
        raise UserError(
            f"job {job} cannot begin (exit status {details.driver_exit_code}): {reason}; build the cluster's image "
            "from this requirements.lock (infra/container/Dockerfile)"
        )
    ours = details.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR" and details.driver_exit_code == FAULT
    kind = RuntimeError if ours else JobLost
    raise kind(f"job {job} failed ({details.error_type}, exit status {details.driver_exit_code}): {reason}")


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else "…" + text[-399:]
