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
    job = _job("sample", recipe, root)
    for needed in job.inputs:
        needs(Context(job).input(needed), name)
    return job


def shards_of(recipe: Recipe, job: Job) -> Artifact | None:
    """The recipe's images beside a sample job of it; None where it reads none.

    Latents know the shards that they were made of: nothing is listed where there are some.
    """
    latents = Context(job).optional("encode")
    if latents is not None:
        made_of = latents.manifest.inputs.get("shard")
        return None if made_of is None else Artifact(job.root, "shard", made_of)
    return Context(_job("shard", recipe, job.root)).artifact if recipe.needs_images else None


def latents_of(recipe: Recipe, name: str, root: str | None) -> Artifact:
    """The recipe's `encode` artifact. Arguments as :func:`sample_job`'s. Raises UserError where it is not complete."""
    artifact = Context(_job("encode", recipe, root)).artifact
    if not artifact.is_complete():
        raise UserError(
            f"{artifact.uri} is not complete, so there are no latents: make them with latentforge run sfd-full "
            f"--recipe {name} --only encode (after its inputs), or name ready ones, data.source.kind: latents"
        )
    return artifact


def _job(wanted: str, recipe: Recipe, root: str | None) -> Job:
    place, jobs = Storage.at(root or default_root()).url, dict[str, Job]()
    for stage in STAGES:
        if not stage.present(recipe) and stage.name != wanted:
            continue
        prints = {needed: jobs[needed].fingerprint for needed in stage.inputs if needed in jobs}
        jobs[stage.name] = stage.job(recipe, place, prints)
        if stage.name == wanted:
            break
    return jobs[wanted]


def needs(artifact: Artifact, recipe: str) -> None:
    """Raises UserError where the artifact is not complete."""
    if not artifact.is_complete():
        raise UserError(
            f"{artifact.uri} is not complete, so there is nothing to sample from: run the recipe first, for example "
            f"latentforge run sfd-full --recipe {recipe}, with the same --set and --root"
        )
