"""Files as the authors' codes write them, with random weights at small width."""

from __future__ import annotations

import collections
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def foreign_classes(*names: str, base: type = object) -> Iterator[list[type]]:
    """Classes of these dotted names, which can be pickled inside and not imported outside."""
    made, modules = [], set[str]()
    for name in names:
        module, _, own = name.rpartition(".")
        for parent in (module.partition(".")[0], module):
            if parent not in sys.modules:
                sys.modules[parent] = types.ModuleType(parent)
                modules.add(parent)
        made.append(type(own, (base,), {"__module__": module}))
        setattr(sys.modules[module], own, made[-1])
    try:
        yield made
    finally:
        for module in modules:
            sys.modules.pop(module, None)


@contextmanager
def omegaconf() -> Iterator[typing.Callable[[Any], Any]]:
    """Gives a function from plain values to what omegaconf 2.3 makes of them: the same classes,
    attributes and links to parents, as far as a pickle knows of them."""
    names = ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode", "base.ContainerMetadata")
    with foreign_classes(*(f"omegaconf.{name}" for name in names)) as (mapping, listing, node, metadata):

        def made(kind: type, parent: Any, **state: Any) -> Any:
            found = kind()
            facts = metadata()
            facts.__dict__ = {
                "ref_type": typing.Any,
                "object_type": dict,
                "optional": True,
                "flags": {},
                "resolver_cache": collections.defaultdict(dict),
            }
            found.__dict__ = {"_metadata": facts, "_parent": parent, **state}
            return found

        def config(value: Any, parent: Any = None) -> Any:
            if isinstance(value, Mapping):
                own = made(mapping, parent)
                own._content = {key: config(each, own) for key, each in value.items()}
                return own
            if isinstance(value, list):
                own = made(listing, parent)
                own._content = [config(each, own) for each in value]
                return own
            return made(node, parent, _val=value)

        yield config


def save_sfd(path: Path, averaged: Mapping[str, Tensor], raw: Mapping[str, Tensor], model: Mapping[str, Any]) -> Path:
    """As SFD's training saves: weights, averages, optimizer, and an OmegaConf configuration."""
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with omegaconf() as config:
        content = {
            "model": dict(raw),
            "ema": dict(averaged),
            "opt": torch.optim.AdamW(parameters).state_dict(),
            "config": config({"model": dict(model), "train": {"max_steps": 400000}, "vae": {"sizes": [16, 16]}}),
        }
        torch.save(content, path)
    return path


def save_lightningdit(
    path: Path, averaged: Mapping[str, Tensor], raw: Mapping[str, Tensor], model: Mapping[str, Any]
) -> Path:
    """As LightningDiT's training saves under DDP and torch.compile, with a plain configuration."""
    torch.save(
        {
            "model": {f"module._orig_mod.{name}": value for name, value in raw.items()},
            "ema": dict(averaged),
            "opt": {"state": {}, "param_groups": []},
            "config": {"model": dict(model)},
        },
        path,
    )
    return path


def save_tokenizer(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """As Lightning saves latent-diffusion's autoencoder: losses and other networks beside it, and
    hyper-parameters of a class of its own."""
    with omegaconf() as config:
        torch.save(
            {
                "state_dict": {
                    **tensors,
                    "loss.logvar": torch.zeros(()),
                    "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(2),
                    "foundation_model.model.cls_token": torch.zeros(1, 1, 3),
                },
                "epoch": 50,
                "hyper_parameters": config({"ddconfig": {"ch_mult": [1, 2]}}),
            },
            path,
        )
    return path


def save_statistics(path: Path, mean: Tensor, std: Tensor) -> Path:
    """As both codes cache statistics of latents: (1, C, 1, 1) each."""
    torch.save({"mean": mean.view(1, -1, 1, 1), "std": std.view(1, -1, 1, 1)}, path)
    return path


def hub_cache(cache: Path, repository: str, files: Mapping[str, bytes], kind: str = "model") -> str:
    """A repository's files as huggingface_hub keeps them; gives its name as a location."""
    folder = cache / f"{kind}s--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    for name, content in files.items():
        target = folder / "snapshots" / ("0" * 40) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return f"hf://{repository}"


def save_latents(
    folder: Path, recipe: Any, rows: tuple[int, ...] = (70, 45), seed: int = 0, **changed: Tensor | None
) -> dict[str, Tensor]:
    """Shards of latents as both codes write them, for a recipe's shapes; gives all rows by the published names.

    changed: tensors of another kind, by name; None leaves one out.
    """
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    side, groups = recipe.latent_size, recipe.channel_groups
    shapes = {"latents": groups["texture"]}
    if "semantic" in groups:
        shapes["latents_sv"] = groups["semantic"]
    if recipe.foundation is not None:
        shapes["feats_dino"] = recipe.foundation.feature_dim
    folder.mkdir(parents=True, exist_ok=True)
    everything: dict[str, list[Tensor]] = collections.defaultdict(list)
    for number, count in enumerate(rows):
        own: dict[str, Tensor] = {"labels": torch.randint(recipe.data.classes, (count,))}
        for name, channels in shapes.items():
            dtype = torch.float16 if name == "feats_dino" else torch.float32
            for suffix in ("", "_flip"):
                own[name + suffix] = (torch.randn(count, channels, side, side) * 3 + 1).to(dtype)
        own = {name: value for name, value in (own | changed).items() if value is not None}  # type: ignore[operator]
        save_file(own, folder / f"latents_rank{number:02d}_shard000.safetensors")
        for name, value in own.items():
            everything[name].append(value)
    return {name: torch.cat(values) for name, values in everything.items()}
