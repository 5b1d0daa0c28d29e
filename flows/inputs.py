"""The job of a recipe's `sample` stage on artifacts that are there: what commands beside the flows start from."""

from __future__ import annotations

from configs import Recipe, UserError
from flows.stages import STAGES
from infra.artifacts import Artifact
from infra.home import default_root
from infra.storage import Storage
from tasks.stage import Context, Job


def sample_job(recipe: Recipe, name: str, root: str | None) -> Job:
    """The job of the recipe's sample stage.

    name: of the recipe, for messages. Raises UserError where an input is not complete.
    """
    place, jobs = Storage.at(root or default_root()).url, dict[str, Job]()
    for stage in STAGES:
        if not stage.present(recipe):
            continue
        prints = {needed: jobs[needed].fingerprint for needed in stage.inputs if needed in jobs}
        jobs[stage.name] = stage.job(recipe, place, prints)
        if stage.name == "sample":
            break
    job = jobs["sample"]
    for needed in job.inputs:
        needs(Context(job).input(needed), name)
    return job


def needs(artifact: Artifact, recipe: str) -> None:
    """Raises UserError where the artifact is not complete."""
    if not artifact.is_complete():
        raise UserError(
            f"{artifact.uri} is not complete, so there is nothing to sample from: run the recipe first, for example "
            f"latentforge run sfd-full --recipe {recipe}, with the same --set and --root"
        )
