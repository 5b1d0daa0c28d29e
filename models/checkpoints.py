"""Checkpoint files: the authors' layouts and ours, read safely and written back.

Reading never runs code from a file: torch files are opened with weights_only, and one that would need more is
refused with the way out. Ours is one safetensors file: tensors under their published names, `raw.*` for weights
without averaging where the file had both, `statistics.<group>.mean|std` for latent statistics, `extra.*` for
tensors that belong to training, and kind and constructor arguments in the metadata.
Errors are ValueError and name the file. Fetching from URLs and hubs is infra/weights.py.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.formats import (
    Arguments,
    Kind,
    infer_arguments,
    kind_of,
    lightningdit_from_authors,
    semantic_vae_from_authors,
)

FORMAT = "latentforge-model/1"
NESTED = ("ema", "model", "state_dict", "model_state_dict")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
# Networks and losses that the authors' tokenizer files carry along.
_NOT_OURS = ("loss.", "foundation_model.")
_EXTRA = ("linear_proj.",)
# Plain data that published files hold beside tensors (configs, loss values); building it runs no code of the file's.
_INERT: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")),
    # The function that rebuilds a NumPy number, under the names that old and new NumPy gave it.
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
Which = Literal["ema", "raw"]


@dataclass(frozen=True)
class Statistics:
    """Per-channel mean and standard deviation of raw latents, each (C,)."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """One network's weights and what is known about them."""

    kind: Kind
    tensors: dict[str, Tensor]
    """State dict, averaged weights where the file has them."""
    arguments: Arguments = field(default_factory=dict)
    """Constructor arguments for `models.formats.build`, plain JSON values; empty when unknown."""
    raw: dict[str, Tensor] = field(default_factory=dict)
    """State dict without averaging, where the file has both."""
    statistics: dict[str, Statistics] = field(default_factory=dict)
    """By channel group."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of training that go back out (VA-VAE's `linear_proj`)."""
    nesting: tuple[str, ...] = ()
    """Keys under which the file held state dicts; empty for a flat file."""
    dropped: tuple[str, ...] = ()
    """Names in the file that belong to other networks or losses."""


def read(path: Path, *, num_heads: int | None = None, semantic_channels: int | None = None) -> Checkpoint:
    """A checkpoint in the authors' layouts (nested or flat, with or without wrapper prefixes) or ours.

    num_heads, semantic_channels: what names and shapes alone may not tell, see `formats.infer_arguments`;
        when they are needed and missing, `arguments` stays empty.
    Raises ValueError when the file is damaged, unsafe, or holds no network we know.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path, num_heads, semantic_channels)
    content = load_torch_file(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    nested = [key for key in NESTED if isinstance(content.get(key), dict) and content[key]]
    states = {key: _state_dict(content[key]) for key in nested} or {"": _state_dict(content)}
    chosen = next(iter(states))
    tensors, extra, dropped = _sorted_out(states[chosen])
    raw = _sorted_out(states["model"])[0] if chosen == "ema" and "model" in states else {}
    kind = _kind(path, tensors)
    arguments = _arguments(tensors, _stored_arguments(kind, content), num_heads, semantic_channels)
    return Checkpoint(kind, tensors, arguments, raw, extra=extra, nesting=tuple(nested), dropped=tuple(dropped))


def load_torch_file(path: Path) -> Any:
    """The content of a torch file on the CPU, memory-mapped where possible; tensors and plain data only.
    Raises ValueError when it is damaged or would need code to be run.
    """
    try:
        with torch.serialization.safe_globals(_INERT):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {found.group(1)}" if found else "more than tensors and plain data"
        raise ValueError(
            f"{path}: refused, because it holds {what} and reading that could run code. If you trust its "
            f'origin, convert it once where running it does no harm: python -c "import torch; '
            f"c = torch.load('{path.name}', weights_only=False); torch.save({{k: v for k, v in c.items() if "
            f"k in {NESTED}}} or c, 'tensors.pt')\", then use tensors.pt"
        ) from error
    except Exception as error:  # bytes that are no checkpoint fail in any way at all
        raise ValueError(f"{path}: not a torch checkpoint, or damaged ({_first_line(error)})") from error


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Our format. Dtypes and bits are kept."""
    tensors = dict(checkpoint.tensors)
    tensors |= {f"raw.{name}": value for name, value in checkpoint.raw.items()}
    tensors |= {f"extra.{name}": value for name, value in checkpoint.extra.items()}
    for group, statistics in checkpoint.statistics.items():
        tensors[f"statistics.{group}.mean"] = statistics.mean
        tensors[f"statistics.{group}.std"] = statistics.std
    facts = {"kind": checkpoint.kind, "arguments": checkpoint.arguments, "nesting": checkpoint.nesting}
    # Clones, because safetensors refuses tensors that share memory.
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        path,
        metadata={"format": FORMAT, "facts": json.dumps(facts)},
    )


def write_authors(path: Path, checkpoint: Checkpoint) -> None:
    """The authors' layout of this kind, as the file it came from was nested (or as theirs are): a torch file
    that their code, and `weights_only`, can load.
    """
    default = {"lightningdit": ("model", "ema"), "autoencoder": ("state_dict",)}
    nesting = checkpoint.nesting or default.get(checkpoint.kind, ("model_state_dict",))
    main = {name: value.detach().cpu() for name, value in (checkpoint.tensors | checkpoint.extra).items()}
    raw = {name: value.detach().cpu() for name, value in checkpoint.raw.items()} or main
    content: dict[str, Any] = {key: raw if key == "model" and "ema" in nesting else main for key in nesting}
    if checkpoint.kind == "semantic_vae" and checkpoint.arguments:
        content["input_dim"] = checkpoint.arguments["feature_dim"]
        content["bottleneck_dim"] = checkpoint.arguments["bottleneck"]
    torch.save(content, path)


def read_statistics(path: Path) -> Statistics:
    """The authors' latent statistics file, {'mean', 'std'} of shape (1, C, 1, 1) or (C,).
    Raises ValueError when it is something else or a deviation is not positive.
    """
    content = load_torch_file(path)
    if not isinstance(content, dict) or not {"mean", "std"} <= content.keys():
        raise ValueError(f"{path}: expected latent statistics, a dictionary with 'mean' and 'std'")
    mean, std = content["mean"].flatten(), content["std"].flatten()
    if mean.shape != std.shape or not bool((std > 0).all()):
        raise ValueError(f"{path}: mean and std must have one value per channel, std above 0")
    return Statistics(mean, std)


def write_statistics(path: Path, statistics: Statistics) -> None:
    """The authors' latent statistics file: (1, C, 1, 1) each."""
    torch.save({"mean": statistics.mean.view(1, -1, 1, 1), "std": statistics.std.view(1, -1, 1, 1)}, path)


def load_into(model: nn.Module, checkpoint: Checkpoint, where: str, which: Which = "ema") -> None:
    """Load a checkpoint's weights into a network of the same shape; `where` names it in errors.

    Strict, but for the alignment head, which only training uses: one that the file lacks keeps its fresh
    weights, one that the network lacks is left out. What a network has `added` to a published one keeps its fresh
    weights as well where the file lacks it. Raises ValueError listing what does not fit.
    """
    source = checkpoint.raw if which == "raw" and checkpoint.raw else checkpoint.tensors
    expected = model.state_dict()
    head = "repa_projector."
    fresh = (head, *getattr(model, "added", ()))
    missing = sorted(name for name in expected.keys() - source.keys() if not name.startswith(fresh))
    surplus = sorted(name for name in source.keys() - expected.keys() if not name.startswith(head))
    shapes = [
        f"{name} {tuple(source[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in source and source[name].shape != value.shape
    ]
    problems = []
    for label, names in (("missing", missing), ("unknown", surplus), ("of another shape", shapes)):
        if names:
            problems.append(f"{len(names)} tensors {label} (such as {', '.join(names[:3])})")
    if problems:
        raise ValueError(
            f"{where} does not fit this {type(model).__name__}: {'; '.join(problems)}. Make the model section "
            f"match the file: `python -m flows weights inspect` shows what it holds"
        )
    model.load_state_dict({name: source.get(name, value) for name, value in expected.items()})


def _read_safetensors(path: Path, num_heads: int | None, semantic_channels: int | None) -> Checkpoint:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({_first_line(error)})") from error
    if metadata.get("format") != FORMAT:
        main, extra, dropped = _sorted_out(_state_dict(tensors))
        arguments = _arguments(main, {}, num_heads, semantic_channels)
        return Checkpoint(_kind(path, main), main, arguments, extra=extra, dropped=tuple(dropped))
    facts = json.loads(metadata["facts"])
    parts: dict[str, dict[str, Tensor]] = {"raw": {}, "extra": {}, "statistics": {}, "": {}}
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        part = head if head in parts else ""
        parts[part][rest if part else name] = value
    statistics = {
        group: Statistics(parts["statistics"][f"{group}.mean"], parts["statistics"][f"{group}.std"])
        for group in sorted({name.rpartition(".")[0] for name in parts["statistics"]})
    }
    return Checkpoint(
        facts["kind"],
        parts[""],
        facts["arguments"],
        parts["raw"],
        statistics,
        parts["extra"],
        tuple(facts["nesting"]),
    )


def _state_dict(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, without the prefixes that DDP and torch.compile put before names."""
    return {_WRAPPERS.sub("", name): value for name, value in content.items() if isinstance(value, Tensor)}


def _sorted_out(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    extra = {name: value for name, value in tensors.items() if name.startswith(_EXTRA)}
    dropped = [name for name in tensors if name.startswith(_NOT_OURS)]
    left = {name: value for name, value in tensors.items() if name not in extra and name not in dropped}
    return left, extra, dropped


def _kind(path: Path, tensors: Mapping[str, Tensor]) -> Kind:
    try:
        return kind_of(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _stored_arguments(kind: Kind, content: Mapping[str, Any]) -> Arguments:
    """Constructor arguments that a file states beside its tensors."""
    if kind == "semantic_vae":
        return semantic_vae_from_authors(content)
    config = content.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if kind == "lightningdit" and isinstance(model, dict) and "hidden_size" in model:
        return lightningdit_from_authors(model)
    return {}


def _arguments(
    tensors: Mapping[str, Tensor],
    stored: Arguments,
    num_heads: int | None,
    semantic_channels: int | None,
) -> Arguments:
    heads = num_heads or stored.get("num_heads")
    semantic = semantic_channels or (stored["groups"]["sizes"][1] if "groups" in stored else None)
    try:
        _, inferred = infer_arguments(tensors, num_heads=heads, semantic_channels=semantic)
    except ValueError:
        return {}
    return inferred | stored


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
