"""A trained recipe as others use it: a folder that diffusers loads alone.

model_index.json  pipeline.py
transformer/      config.json, weights, network.py
vae/              diffusers' AutoencoderKL where it has such a network, else with tokenizer.py
scheduler/        scheduler_config.json, scheduler.py
guide/            of autoguidance, as transformer/
statistics.json   of the latents by channel group
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from configs import Recipe, UserError
from configs.autoencoders import DiffusersModel, PythonModel
from configs.diffusion import UnetModel
from configs.rules import models_of
from configs.sampling import AutoGuidance, NoGuidance, RoutedGuidance, Sample, SampleResolution
from configs.sampling_rules import sampled
from infra.weights import load_pretrained
from models.checkpoints import stamped
from tasks.data.statistics import LatentStatistics
from tasks.networks import build_network, kind_and_arguments, sampling_clock, trained_autoencoder, trained_dit
from tasks.sharing import autoencoder_kl
from tasks.sharing.bundle import bundle
from tasks.stage import Context

WEIGHTS = "diffusion_pytorch_model.safetensors"
_CODE = "tasks.sharing.code"
_KNOWN = {
    *("images", "labels", "guidance", "solver", "steps", "shift", "off_by_one", "ema", "ema_sigma", "batch", "stages"),
    *("precision", "seed", "side", "augment", "times", "delta", "shift_base"),
    *("method", "scale", "groups", "interval_start", "interval_end", "channels", "semantic_scale", "weights", "model"),
}
"""Fields of a sample that the shared scheduler takes, or that say nothing of a single image."""


def write_folder(context: Context, folder: Path) -> None:
    """The networks of a `sample` job, and how it samples.

    Raises:
        UserError: the recipe samples in a way that the shared code does not know.
    """
    recipe = context.recipe
    settings = _settings(recipe)
    _refuse_own_parts(recipe)
    model = context.input("train_dit")
    network = trained_dit(model, recipe.sample.ema, recipe.sample.ema_sigma)
    statistics = LatentStatistics.from_facts(model.manifest.facts, model.uri)
    index: dict[str, Any] = {
        "_class_name": ["pipeline", "LatentforgePipeline"],
        "_diffusers_version": version("diffusers"),
        "transformer": ["network", "LatentforgeNetwork"],
        "scheduler": ["scheduler", "LatentforgeScheduler"],
        "guide": [None, None],
        "classes": _classes(context),
    }
    _network(folder / "transformer", recipe, network, None)
    guides = {each.weights: each for each in _guides(recipe)}
    if len(guides) > 1:
        raise UserError(f"sample.stages name {len(guides)} weak guides: a shared folder holds one")
    for guide in guides.values():
        weak = build_network(recipe, guide.model)
        load_pretrained(weak, guide.weights)
        _network(folder / "guide", recipe, weak, guide)
        index["guide"] = ["network", "LatentforgeNetwork"]
    index |= _tokenizer(folder / "vae", context, statistics)
    _write(folder / "scheduler" / "scheduler_config.json", {"_class_name": "LatentforgeScheduler", **settings})
    _code(folder / "scheduler" / "scheduler.py")
    _code(folder / "pipeline.py")
    groups = zip(recipe.channel_groups, statistics.columns, strict=True)
    told = {group: {each: statistics.values[column][each] for each in ("mean", "std")} for group, column in groups}
    _write(folder / "statistics.json", told)
    _write(folder / "model_index.json", index)


def _refuse_own_parts(recipe: Recipe) -> None:
    """Raises UserError where a part has no place in a folder that others run."""
    for field, section in sampled(recipe):
        if isinstance(section.guidance, RoutedGuidance):
            raise UserError(
                f"{field}.guidance.method is routed: the shared code routes no tokens; export with "
                "classifier_free or none"
            )
    if recipe.tune_fewstep is not None:
        raise UserError("tune_fewstep is set: the shared code knows no flow map; share the artifact itself")
    for field, model in models_of(recipe):
        if getattr(model, "head", None) is not None:
            raise UserError(f"{field}.head is set: the shared code knows no wide head; share the artifact itself")
    if isinstance(recipe.train_vavae.model, PythonModel):
        raise UserError(
            f"train_vavae.model.kind is python ({recipe.train_vavae.model.file}): code of your own is not shared by "
            "this command; share it beside the artifacts"
        )


def _network(folder: Path, recipe: Recipe, network: nn.Module, guide: AutoGuidance | None) -> None:
    kind, arguments = kind_and_arguments(recipe, "train_dit", None if guide is None else guide.model)
    _weights(folder, {f"network.{name}": value for name, value in network.state_dict().items()})
    _write(folder / "config.json", {"_class_name": "LatentforgeNetwork", "kind": kind, "arguments": arguments})
    _code(folder / "network.py")


def _tokenizer(folder: Path, context: Context, statistics: LatentStatistics) -> dict[str, Any]:
    """Writes it; returns what the index says of it and of the latents that it decodes."""
    column, section = statistics.columns[0], context.recipe.train_vavae.model
    mean, std = (each.astype(float).tolist() for each in (statistics.mean([column]), statistics.std([column])))
    latents = {"latents": {"mean": mean, "std": std}}
    network = trained_autoencoder(context.input("train_vavae"))
    if isinstance(section, DiffusersModel):
        found: Any = network  # a DiffusersAutoencoder
        _weights(folder, found.network.state_dict())
        _write(folder / "config.json", {"_class_name": section.class_name, **found.described.arguments})
        return {"vae": ["diffusers", section.class_name], "unit": section.class_name == "AutoencoderRAE", **latents}
    _, arguments = kind_and_arguments(context.recipe, "train_vavae")
    theirs = None if section.identity else autoencoder_kl.config_of(arguments)
    if theirs is not None:
        _weights(folder, autoencoder_kl.renamed(network.state_dict()))
        scale = {"latents_mean": mean, "latents_std": std}
        _write(folder / "config.json", {"_class_name": "AutoencoderKL", **theirs, **scale})
        return {"vae": ["diffusers", "AutoencoderKL"], "pointwise": True, **latents}
    _weights(folder, {f"network.{name}": value for name, value in network.state_dict().items()})
    own = {"_class_name": "LatentforgeTokenizer", "arguments": None if section.identity else arguments}
    _write(folder / "config.json", own)
    _code(folder / "tokenizer.py")
    return {"vae": ["tokenizer", "LatentforgeTokenizer"], **latents}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The scheduler's configuration (`tasks/sharing/code/scheduler.py`)."""
    stages = [(stage, recipe.sample.at(stage)) for stage in recipe.sampled_resolutions]
    for section in (recipe.sample, *(stage for stage, _ in stages), *(own.guidance for _, own in stages)):
        changed = section.model_dump(exclude_defaults=True).keys() - _KNOWN
        if changed:
            raise UserError(
                f"sample.{min(changed)} is set, and the code of a shared folder does not know it: export with "
                "its default"
            )
    cascade, unet = recipe.train_dit.cascade, recipe.train_dit.model
    sigmas = None
    if isinstance(unet, UnetModel):
        sigmas = {"low": unet.sigma_min, "high": unet.sigma_max, "rho": unet.rho}
    clock: Any = sampling_clock(recipe)
    return {
        "groups": recipe.channel_groups,
        "offsets": list(clock.offsets),
        "stages": [_stage(recipe, stage, own) for stage, own in stages],
        "cascade": None if cascade is None else {"sides": list(cascade.sides), "upsample": cascade.upsample},
        "sigmas": sigmas,
        "precision": recipe.sample.precision,
        "batch": recipe.sample.batch,
    }


def _stage(recipe: Recipe, stage: SampleResolution, section: Sample) -> dict[str, Any]:
    asked, guidance = section.guidance, dict[str, Any](method=section.guidance.method)
    if not isinstance(asked, NoGuidance):
        guidance |= {"scales": list(asked.scales(recipe.channel_groups)), "interval": list(asked.interval)}
        guidance["channels"] = getattr(asked, "channels", None)
    return {
        "side": stage.side,
        "solver": section.solver,
        "steps": section.steps,
        "shift": recipe.time_shift(section.shift_base, section.shift),
        "times": None if section.times is None else list(section.times),
        "steps_are_points": section.off_by_one,
        "augment": stage.augment,
        "guidance": guidance,
    }


def _guides(recipe: Recipe) -> list[AutoGuidance]:
    found = [recipe.sample.at(stage).guidance for stage in recipe.sampled_resolutions]
    return [each for each in found if isinstance(each, AutoGuidance)]


def _classes(context: Context) -> list[str] | None:
    from tasks.sharing.card import shards_beside

    shards = shards_beside(context)
    return None if shards is None else [str(name) for name in shards.manifest.facts["classes"]]


def _weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    (folder / WEIGHTS).write_bytes(stamped(data, {}, "pt"))  # what other readers look for


def _code(target: Path) -> None:
    target.write_text(bundle(f"{_CODE}.{target.stem}"))


def _write(target: Path, values: Any) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(values, indent=2) + "\n")
