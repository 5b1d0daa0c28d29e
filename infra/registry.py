"""MLflow's model registry: a shared folder as a version of a registered model, and such a version as files again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs.errors import UserError, brief
from infra.tracking import evaluated_runs, reader, tracking_uri

SCHEME = "models:/"
_PLACE = "model"
"""The folder's place among the files of its run, where servers allow that a version's source lies."""


def name_of(option: str, address: str) -> str:
    """NAME of `models:/NAME`. Raises UserError where it says something else."""
    name = address.removeprefix(SCHEME)
    if not name or set(name) & set("/:@'"):
        raise UserError(f"{option} {address}: expected models:/NAME; the registry counts its versions")
    return name


def run_of(option: str, address: str, evaluation: str | None) -> str:
    """Id of the newest run that led to an evaluation. Raises UserError where there is none."""
    found = next((run.id for run in evaluated_runs() if run.evaluation == evaluation), None)
    if found is None:
        raise UserError(
            f"{option} {address}: a version belongs to a run with scores, and MLflow at {tracking_uri()} has none of "
            "this model: run it, or share it as a folder"
        )
    return found


def register(name: str, run: str, folder: Path) -> str:
    """Put a folder beside a run's files and make it the next version of a model; returns `models:/NAME/VERSION`.

    A run that is a version of it already stays the one that it is.
    """
    from mlflow.exceptions import MlflowException

    client = reader()
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run}'")
    if known:
        return f"{SCHEME}{name}/{known[0].version}"
    found = client.get_run(run)
    client.log_artifacts(run, str(folder), _PLACE)
    made = client.create_model_version(
        name,
        f"{found.info.artifact_uri}/{_PLACE}",
        run_id=run,
        await_creation_for=0,  # which else is announced in a line
        description=found.data.tags.get("mlflow.note.content"),
        tags={each: found.data.tags[each] for each in ("recipe", "overrides") if found.data.tags.get(each)},
    )
    return f"{SCHEME}{name}/{made.version}"


def fetch(option: str, address: str, target: Path) -> Path:
    """Files of `models:/NAME` (the newest version), `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    They are copied below `target` where MLflow does not keep them on this machine.

    Raises:
        UserError: the registry has no such model, or its files cannot be had.
    """
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    client, name = reader(), address.removeprefix(SCHEME)
    try:
        source = client.get_model_version_download_uri(*_version(client, name))
        return Path(download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=tracking_uri()))
    except (MlflowException, OSError) as error:
        said = brief(error, 160)
        raise UserError(f"{option} {address}: not in the registry of MLflow at {tracking_uri()} ({said})") from None


def _version(client: Any, name: str) -> tuple[str, str]:
    model, alias, named = name.partition("@")
    if alias:
        return model, str(client.get_model_version_by_alias(model, named).version)
    model, _, version = name.partition("/")
    if version:
        return model, version
    newest = max((int(each.version) for each in client.get_registered_model(model).latest_versions), default=None)
    if newest is None:
        raise FileNotFoundError("it has no version")
    return model, str(newest)
