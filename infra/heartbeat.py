"""A flow run says that it lives, so that Prefect's server can tell when it does not any more.

Prefect sends signs of life of its own, but over one connection that does not come back after a server was away for
minutes. These are single requests. What a server does about silence is in `infra/prefect/automations.yaml`.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

AUTOMATIONS = Path(__file__).parent / "prefect" / "automations.yaml"
EVENT = "latentforge.flow-run.alive"
UNHEARD = "Unheard"
SECONDS = 15.0


@contextmanager
def beating(flow_run: str, seconds: float = SECONDS) -> Iterator[None]:
    """Tell Prefect's server again and again that this flow run lives; nothing without an id.

    A server that is away is told when it is back.
    """
    if not flow_run:
        yield
        return
    over = threading.Event()
    context = contextvars.copy_context()  # Prefect's settings belong to it
    threading.Thread(target=context.run, args=(_beat, UUID(flow_run), seconds, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def install() -> None:
    """Have the server of PREFECT_API_URL act on silence; automations of the same names are replaced."""
    import yaml
    from prefect.automations import AutomationCore
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for values in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
            made = AutomationCore.model_validate(values)
            for old in client.read_automations_by_name(made.name):
                client.delete_automation(old.id)
            client.create_automation(made)


def _beat(flow_run: UUID, seconds: float, over: threading.Event) -> None:
    from prefect.client.orchestration import get_client

    while not over.is_set():
        with suppress(Exception), get_client(sync_client=True, httpx_settings={"timeout": seconds}) as client:
            client.request("POST", "/events", json=[_sign(flow_run)])  # type: ignore[arg-type]  # not among its own
            found = client.read_flow_run(flow_run)
            if found.state is not None and found.state.name == UNHEARD and not over.is_set():
                _heard_again(client, flow_run)
        over.wait(seconds)


def _heard_again(client: Any, flow_run: UUID) -> None:
    from prefect.states import Running

    client.set_flow_run_state(flow_run, Running(message="It is heard again."), force=True)


def _sign(flow_run: UUID) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "event": EVENT,
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{flow_run}"},
        "related": [],
        "payload": {},
    }
