"""What a flow run is called in Prefect: by its recipe and what it changes, as in MLflow."""

from __future__ import annotations

from typing import Any


def title() -> str:
    """Of the flow run under way; a mistake in its recipe is told by the flow itself."""
    from prefect.runtime import flow_run

    return title_of(dict(flow_run.parameters or {}))


def title_of(parameters: dict[str, Any]) -> str:
    """`demo guidance.scale=4` from a flow's parameters."""
    from configs import UserError
    from configs.naming import run_name

    recipe = str(parameters.get("recipe", ""))
    try:
        return run_name(recipe, parameters.get("overrides") or [])
    except UserError:
        return recipe
