"""A flow run as MLflow and Prefect see it: open while it lasts, closed as what it was, whatever ends it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.settings import get_current_settings
from prefect.states import Cancelled

from configs.errors import brief
from infra import heartbeat, logs, open_runs, prefect_server, stopping, tracking
from infra.cluster import disconnect

STOPS = (KeyboardInterrupt, SystemExit, TerminationSignal)
"""What ends a run that did nothing wrong."""


def flow_run_id() -> str:
    """Prefect's id of the flow run under way; empty outside of one."""
    context = FlowRunContext.get()
    return str(context.flow_run.id) if context and context.flow_run else ""


@contextmanager
def tracked(experiment: str, name: str, tags: Mapping[str, str], jobs: bool = False) -> Iterator[tracking.Tracker]:
    """The MLflow run of the flow run under way, and what an earlier process left open closed first.

    Args:
        experiment: MLflow's experiment.
        name: the run's name there.
        tags: its tags; `prefect_flow_run` is added.
        jobs: whether stages go on without this process.
    """
    stopping.take_again()  # from Prefect, which would call a stopped run a crash
    flow_run = flow_run_id()
    open_runs.close_abandoned(flow_run)
    tracker = tracking.start_run(experiment, name, {**tags, "prefect_flow_run": flow_run})
    api = "" if prefect_server.is_temporary() else get_current_settings().api.url or ""
    opened = open_runs.OpenRun(flow_run, api, tracker.uri, tracker.run, jobs)
    with (
        open_runs.listed(opened),
        heartbeat.beating(flow_run if api else ""),
    ):  # a temporary server goes with its command
        try:
            yield tracker
        except STOPS:
            _end(tracker, "KILLED", jobs)
            if stopping.asked():
                _tell_prefect(flow_run)
            raise
        except BaseException:
            _end(tracker, "FAILED", jobs)
            raise
        else:
            _finish(tracker)
        finally:
            disconnect()


def _finish(tracker: tracking.Tracker) -> None:
    """End the run. What it made is whole, whatever MLflow answers."""
    try:
        tracker.finish()
    except Exception as error:
        logs.say(f"MLflow shows the run as if it went on: it did not take its end ({brief(error)})", "warning")


def _end(tracker: tracking.Tracker, status: str, jobs: bool) -> None:
    """End the run and those of its stages that were only just begun; jobs end theirs themselves."""
    with suppress(Exception):  # MLflow may be what failed; the first error is the one to tell
        for run in [] if jobs else tracker.running_children():
            run.finish(status)
        tracker.finish(status)


def _tell_prefect(flow_run: str) -> None:
    """That the run was cancelled, before Prefect takes the interruption for a crash."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    from prefect.client.orchestration import get_client

    with suppress(Exception), get_client(sync_client=True) as client:
        state: State[Any] = Cancelled(message="It was asked to stop.")
        client.set_flow_run_state(UUID(flow_run), state, force=True)
        context.flow_run.state = state
