"""`README.md` of a shared folder: what the model is, what it saw, how it scored, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from configs import Recipe
from configs.published import scores_of_pictures
from configs.sampling import Guidance, Sample
from infra.artifacts import Artifact, Manifest
from tasks.stage import Context

GRID = "grid.png"
_FLOOR = "floor_"
_CLASSES_SHOWN = 20
_PUBLIC = ("hf://", "https://")


def shards_beside(context: Context) -> Artifact | None:
    """The images that the latents of a `sample` job were made of; None where there are none or they are gone."""
    latents = context.optional("encode")
    made_of = None if latents is None else latents.manifest.inputs.get("shard")
    found = None if made_of is None else Artifact(context.job.root, "shard", made_of)
    return found if found is not None and found.is_complete() else None


def card(context: Context, evaluated: Manifest | None) -> str:
    """The page, with the front matter that hubs read. Places of the recipe's data, which are its owner's, are left out.

    context: of a `sample` job. evaluated: of its scores, where there are some.
    """
    recipe = context.recipe
    front = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation", "tags": _tags(recipe)}
    shards = shards_beside(context)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {recipe.report.title}",
        _lead(recipe),
        f"![One class per column, the first images of each, none chosen]({GRID})" if _grid(context) else "",
        "## How to load it",
        _loading(recipe),
        "## Scores",
        _scores(recipe, evaluated),
        "## Data",
        _data(None if shards is None else shards.manifest),
        "## Recipe",
        f"Model artifact `train_dit/{context.job.inputs['train_dit']}`, sample `{context.job.fingerprint}`.",
        f"```yaml\n{yaml.safe_dump(_shown(recipe), sort_keys=False)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tags(recipe: Recipe) -> list[str]:
    return ["latentforge", "class-conditional", recipe.name]


def _lead(recipe: Recipe) -> str:
    groups = ", ".join(f"{size} channels of {name}" for name, size in recipe.channel_groups.items())
    return (
        f"A class-conditional diffusion model of {recipe.image.size} × {recipe.image.size} images in "
        f"{recipe.data.classes} classes, trained by the recipe `{recipe.name}` of latentforge on "
        f"{recipe.train_dit.images:,} images (repetitions counted). Its latents are {recipe.latent_size} × "
        f"{recipe.latent_size} cells with {groups}."
    )


def _loading(recipe: Recipe) -> str:
    adaptive = any(section.solver == "dopri5" for _, section in _sampled(recipe))
    needs = "diffusers torch" + (" torchdiffeq" if adaptive else "")
    return (
        f"`pip install {needs}`, then, having read the code in this folder, which diffusers runs:\n\n"
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        'pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER OR REPOSITORY", trust_remote_code=True)\n'
        f"images = pipeline(labels=[0, {min(1, recipe.data.classes - 1)}], rows=2, seed=0).images\n```\n\n"
        "`guidance_scale` and `num_inference_steps` stand for what the scores below were made with where they are "
        "given. With latentforge: `latentforge sample --from FOLDER --classes 0`. Latent statistics by channel group "
        "are in `statistics.json`."
    )


def _scores(recipe: Recipe, evaluated: Manifest | None) -> str:
    if evaluated is None:
        return "Not scored."
    counts, scores = evaluated.facts.get("images", {}), evaluated.scores
    published = scores_of_pictures(recipe)
    said = {} if published is None else dict(published.named)
    rows = ["| score | this model | real images | published |", "|---|---|---|---|"]
    for name, value in scores.items():
        if not name.startswith(_FLOOR):
            rows.append(f"| {name} | {value:.4g} | {_cell(scores.get(_FLOOR + name))} | {_cell(said.get(name))} |")
    intervals = evaluated.facts.get("intervals", {})
    spans = "; ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in intervals.items())
    protocol = (
        f"{counts.get('generated', recipe.sample.images):,} generated images ({_way(recipe)}) against "
        f"{counts.get('test', 0):,} real ones on features of "
        f"{evaluated.facts.get('network', recipe.evaluate.features.label)}. Scores on other networks or other numbers "
        "of images do not compare."
    )
    return "\n".join(rows) + f"\n\n{protocol}" + (f" 95 % intervals: {spans}." if spans else "")


def _sampled(recipe: Recipe) -> list[tuple[int, Sample]]:
    """Side and settings of every resolution that a sample goes through."""
    return [(stage.side, recipe.sample.at(stage)) for stage in recipe.sampled_resolutions]


def _way(recipe: Recipe) -> str:
    """From noise to images, for people."""
    stages = _sampled(recipe)
    said = [f"{section.solver}, {section.steps} steps, {_guidance(section.guidance)}" for _, section in stages]
    if len(said) == 1:
        return said[0]
    return "; ".join(f"{side} × {side}: {each}" for (side, _), each in zip(stages, said, strict=True))


def _guidance(asked: Guidance) -> str:
    return "no guidance" if asked.method == "none" else f"{asked.method.replace('_', '-')} guidance {asked.scale:g}"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _data(shards: Manifest | None) -> str:
    if shards is None:
        return "Latents or weights were given; no images were read here."
    classes, splits = shards.facts["classes"], shards.facts["splits"]
    named = ", ".join(str(name) for name in classes[:_CLASSES_SHOWN])
    more = f" and {len(classes) - _CLASSES_SHOWN} more" if len(classes) > _CLASSES_SHOWN else ""
    lines = [
        "- Images: " + ", ".join(f"{count:,} for {split}" for split, count in splits.items()) + ".",
        f"- Classes by label, from 0: {named}{more}.",
    ]
    if refused := shards.facts.get("quarantine"):
        lines.append("- Set aside: " + ", ".join(f"{count:,} ({reason})" for reason, count in refused.items()) + ".")
    return "\n".join(lines)


def _shown(recipe: Recipe) -> Mapping[str, Any]:
    """What made the model and its images: neither where things lie nor how many machines there were."""
    names = ("image", "foundation", "train_vavae", "train_semvae", "train_dit", "sample")
    sections = {name: recipe.section(name) for name in names if getattr(recipe, name, None) is not None}
    return {"name": recipe.name, **_placeless(sections)}


def _placeless(value: Any) -> Any:
    """Of files that only their owner reaches (a guide's weights on this machine, a bucket) the name alone."""
    if isinstance(value, Mapping):
        return {name: _placeless(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(each) for each in value]
    private = isinstance(value, str) and (value.startswith(("/", "~", ".")) or "://" in value)
    return value.rstrip("/").rpartition("/")[2] if private and not value.startswith(_PUBLIC) else value


def _grid(context: Context) -> bool:
    return context.artifact.is_complete() and bool(context.artifact.files(GRID))
