"""Checkpoint files: the authors' layouts and ours, read safely and written back.

Reading never runs code from a file (models/files.py), and finds a network wherever a training code
keeps it (models/state_dicts.py). Ours is one safetensors file: tensors under their published names,
`raw.*` for weights without averaging where the file had both, `statistics.<group>.mean|std` for
latent statistics, `extra.*` for tensors that belong to training, and kind and constructor arguments
in the metadata. Stages write their networks as plain state dicts with the same metadata, which also
holds the statistics and says what made the file (:func:`stamped`).
Errors are ValueError and name the file. Fetching from URLs and hubs is infra/weights.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from models.files import Content, plain, read_content
from models.formats import (
    Arguments,
    Kind,
    build,
    infer_arguments,
    lightningdit_from_authors,
    semantic_vae_from_authors,
)
from models.state_dicts import choose, described, networks, other_layout

FORMAT = "latentforge-model/1"
TENSORS = "latentforge-tensors/1"
"""Of files of ours that hold no network: a part of an objective, a snapshot of an average."""
TENSORS_ONLY = {"kind", "made"}
"""What such a file says of itself."""
NESTED = ("ema", "model", "state_dict", "model_state_dict")
"""Keys of state dicts in the authors' files."""
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_EXTRA = ("linear_proj.",)
_STATED = ("input_dim", "bottleneck_dim", "num_heads")
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
    made: dict[str, Any] = field(default_factory=dict)
    """What a stage says of a file that it wrote: stage, fingerprint, recipe, sections; plain JSON."""


def read(
    path: Path, *, kind: Kind | None = None, num_heads: int | None = None, semantic_channels: int | None = None
) -> Checkpoint:
    """A checkpoint in the authors' layouts or ours, or a network of a kind that we know in whatever
    another training code left: nested, behind prefixes, averaged, in shards.

    kind: of the network that is wanted; None is the only one in the file.
    num_heads, semantic_channels: what names and shapes alone may not tell, see
        `formats.infer_arguments`; when they are needed and missing, `arguments` stays empty.
    Raises ValueError when the file is damaged, unsafe, or holds no such network.
    """
    content = read_content(path)
    try:
        form = content.metadata.get("format")
        if form == FORMAT:
            return _ours(content, kind)
        if form == TENSORS:
            said = json.loads(content.metadata["facts"])["kind"]
            raise ValueError(f"holds {said}, which is no network; give model.safetensors or ema.safetensors beside it")
        return _theirs(content, kind, num_heads, semantic_channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"{type(error).__name__} {' '.join(str(error).split())[:160]}"
        raise ValueError(f"{path}: what it says of its network makes no sense ({what}); fetch it again") from error


def check_whole(checkpoint: Checkpoint) -> None:
    """Build the network of a checkpoint without memory. Raises ValueError where tensors are missing,
    unknown or of another shape, so that the file is of another network that shares some names."""
    if not checkpoint.arguments:
        return
    tensors = checkpoint.tensors
    _check_sizes(checkpoint.arguments, len(tensors))
    try:
        with torch.device("meta"):
            expected = build(checkpoint.kind, checkpoint.arguments).state_dict()
    except (TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"its arguments describe no {checkpoint.kind} ({said}); fetch the file again") from None
    missing, unknown = (sorted(one.keys() - other.keys()) for one, other in ((expected, tensors), (tensors, expected)))
    wrong = [name for name, value in expected.items() if name in tensors and tensors[name].shape != value.shape]
    problems = [
        f"{len(names)} {label} (such as {', '.join(names[:2])})"
        for label, names in (("are missing", missing), ("are unknown", unknown), ("have another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(f"some of its tensors are of the kind {checkpoint.kind}, but {'; '.join(problems)}")


def _check_sizes(arguments: Arguments, tensors: int) -> None:
    """Raises ValueError where a file's arguments ask for more layers than it has tensors, or for sizes that no
    network has: a few bytes must not cost hours or all memory."""
    limits = {"depth": tensors, "blocks_per_level": tensors, "input_size": 1 << 12}
    for name, value in arguments.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        most = limits.get(name, 1 << 20)
        if any(isinstance(number, (int, float)) and not -1 <= number <= most for number in numbers):
            raise ValueError(f"its argument {name} is {str(value)[:100]}, more than its tensors can be; fetch it again")


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Our format. Dtypes and bits are kept."""
    tensors = dict(checkpoint.tensors)
    tensors |= {f"raw.{name}": value for name, value in checkpoint.raw.items()}
    tensors |= {f"extra.{name}": value for name, value in checkpoint.extra.items()}
    for group, statistics in checkpoint.statistics.items():
        tensors[f"statistics.{group}.mean"] = statistics.mean
        tensors[f"statistics.{group}.std"] = statistics.std
    facts = {
        "kind": checkpoint.kind,
        "arguments": checkpoint.arguments,
        "nesting": checkpoint.nesting,
        **({"made": checkpoint.made} if checkpoint.made else {}),
    }
    # Clones, because safetensors refuses tensors that share memory.
    data = save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
    path.write_bytes(stamped(data, facts))


def stamped(data: bytes, facts: Mapping[str, Any], form: str = FORMAT) -> bytes:
    """A safetensors file that says what it is, from one that does not.

    facts: plain JSON; of a network `kind`, `arguments` and, where its latents were standardised,
        `statistics` by channel group. The library writes metadata in another order each time; here
        the same tensors and facts are the same bytes.
    """
    size = int.from_bytes(data[:8], "little")
    header = {"__metadata__": {"facts": json.dumps(facts, sort_keys=True), "format": form}}
    header |= json.loads(data[8 : 8 + size])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as the library aligns the tensors
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(data)[8 + size :]))


def facts_of(path: Path) -> dict[str, Any]:
    """What a safetensors file of ours says of itself; nothing for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata["facts"]) if metadata.get("format") in (FORMAT, TENSORS) else {}
    except _UNREADABLE:
        return {}
    return facts if isinstance(facts, dict) else {}


def write_authors(path: Path, checkpoint: Checkpoint) -> None:
    """The authors' layout of this kind, as the file it came from was nested (or as theirs are): a torch file
    that their code, and `weights_only`, can load.
    """
    default = {"lightningdit": ("model", "ema"), "autoencoder": ("state_dict",)}
    known = set(checkpoint.nesting) <= set(NESTED)
    nesting = (known and checkpoint.nesting) or default.get(checkpoint.kind, ("model_state_dict",))
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
    content = plain(read_content(path).values)
    if not isinstance(content, dict) or not {"mean", "std"} <= content.keys():
        seen = ", ".join(str(key) for key in list(content)[:4]) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected latent statistics, a dictionary with 'mean' and 'std', found {seen}")
    mean, std = (torch.as_tensor(content[name]).flatten() for name in ("mean", "std"))
    finite = bool(torch.isfinite(mean).all() and torch.isfinite(std).all())
    if mean.shape != std.shape or not finite or not bool((std > 0).all()):
        raise ValueError(f"{path}: mean and std must have one finite value per channel, std above 0")
    return Statistics(mean, std)


def travelling_statistics(path: Path) -> dict[str, Statistics]:
    """Latent statistics by channel group that a file of ours carries; none in any other file."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                return {}
            names = [name for name in file.keys() if name.startswith("statistics.")]  # noqa: SIM118 - not a dict
            found = _statistics({name.partition(".")[2]: file.get_tensor(name) for name in names})
            return _said_statistics(json.loads(file.metadata()["facts"])) | found
    except _UNREADABLE:
        return {}


def write_statistics(path: Path, statistics: Statistics) -> None:
    """The authors' latent statistics file: (1, C, 1, 1) each."""
    mean, std = (each.float().view(1, -1, 1, 1) for each in (statistics.mean, statistics.std))
    torch.save({"mean": mean, "std": std}, path)


def load_into(model: nn.Module, checkpoint: Checkpoint, where: str, which: Which = "ema") -> None:
    """Load a checkpoint's weights into a network of the same shape; `where` names it in errors.

    Strict, but for the alignment head, which only training uses: one that the file lacks keeps its fresh
    weights, one that the network lacks is left out. What a network has `added` to a published one keeps its fresh
    weights as well where the file lacks it, and tables of positions that it `resized` are its own.
    Raises ValueError listing what does not fit.
    """
    source = check_fits(model, checkpoint, where, which)
    model.load_state_dict({name: source.get(name, value) for name, value in model.state_dict().items()})


def check_fits(model: nn.Module, checkpoint: Checkpoint, where: str, which: Which = "ema") -> dict[str, Tensor]:
    """The weights that :func:`load_into` would load into this network, which may be on the meta device.
    Raises ValueError listing what does not fit."""
    source = checkpoint.raw if which == "raw" and checkpoint.raw else checkpoint.tensors
    resized: tuple[str, ...] = getattr(model, "resized", ())
    source = {name: value for name, value in source.items() if not (resized and name.startswith(resized))}
    expected = model.state_dict()
    head = "repa_projector."
    fresh = (head, *resized, *getattr(model, "added", ()))
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
    own = getattr(model, "value_residual", False)
    if checkpoint.arguments and bool(checkpoint.arguments.get("value_residual")) != own:
        problems.append(f"trained {'without' if own else 'with'} a value residual, which has no tensors")
    if problems:
        raise ValueError(
            f"{where} does not fit this {type(model).__name__}: {'; '.join(problems)}. Make the model section "
            f"match the file: `latentforge weights inspect` shows what it holds{_of_another_grid(source, shapes)}"
        )
    return source


def _of_another_grid(source: Mapping[str, Tensor], shapes: list[str]) -> str:
    """A hint, where all that is of another shape are tables of positions."""
    table = source.get("pos_embed")
    if table is None or not shapes or not all(each.startswith(("pos_embed ", "feat_rope.")) for each in shapes):
        return ""
    return f", or, for latents of another size, set positions_of: {math.isqrt(table.shape[1])}"


def _theirs(content: Content, kind: Kind | None, num_heads: int | None, semantic_channels: int | None) -> Checkpoint:
    values = content.values
    if not isinstance(values, (Mapping, list)) or type(values) is list:
        raise ValueError(f"expected a dictionary of tensors, found {type(values).__name__}")
    found = networks(values)
    if not found or other_layout(values):
        raise ValueError(described(values, content.foreign))
    main, beside = choose(found, kind)
    extra = {name: value for name, value in main.tensors.items() if name.startswith(_EXTRA)}
    tensors, raw = (
        {name: value for name, value in each.items() if not name.startswith(_EXTRA)}
        for each in (main.tensors, beside.tensors if beside else {})
    )
    stored = _stored_arguments(main.kind, values if isinstance(values, Mapping) else {})
    arguments = _arguments(main.kind, tensors, stored, num_heads, semantic_channels)
    nesting = tuple(each.where for each in (main, beside) if each is not None and each.where)
    return Checkpoint(main.kind, tensors, arguments, raw, {}, extra, nesting, main.dropped)


def _ours(content: Content, kind: Kind | None) -> Checkpoint:
    facts = json.loads(content.metadata["facts"])
    if not isinstance(facts["arguments"], dict):
        raise ValueError(f"its arguments are {str(facts['arguments'])[:100]}; fetch the file again")
    if kind not in (None, facts["kind"]):
        raise ValueError(f"holds {facts['kind']}, but a network of kind {kind} is wanted")
    parts: dict[str, dict[str, Tensor]] = {"raw": {}, "extra": {}, "statistics": {}, "": {}}
    for name, value in content.values.items():
        head, _, rest = name.partition(".")
        part = head if head in parts else ""
        parts[part][rest if part else name] = value
    return Checkpoint(
        facts["kind"],
        parts[""],
        facts["arguments"],
        parts["raw"],
        _said_statistics(facts) | _statistics(parts["statistics"]),
        parts["extra"],
        tuple(facts["nesting"]),
        made=facts.get("made", {}),
    )


def _said_statistics(facts: Mapping[str, Any]) -> dict[str, Statistics]:
    """Statistics in a file's metadata, by channel group; they were exact, and are float64."""
    stored = facts.get("statistics", {})
    parts = {
        group: {name: torch.tensor(each[name], dtype=torch.float64) for name in ("mean", "std")}
        for group, each in stored.items()
    }
    return {group: Statistics(each["mean"], each["std"]) for group, each in parts.items()}


def _statistics(tensors: Mapping[str, Tensor]) -> dict[str, Statistics]:
    groups = sorted({name.rpartition(".")[0] for name in tensors})
    return {group: Statistics(tensors[f"{group}.mean"], tensors[f"{group}.std"]) for group in groups}


def _stored_arguments(kind: Kind, values: Mapping[str, Any]) -> Arguments:
    """Constructor arguments that a file states beside its tensors; some of them, or none."""
    if kind == "semantic_vae":
        return semantic_vae_from_authors({name: plain(values[name]) for name in values if name in _STATED})
    config = plain(values.get("config"))
    model = config.get("model") if isinstance(config, dict) else None
    if kind != "lightningdit" or not isinstance(model, dict):
        return {}
    if "hidden_size" in model:
        return lightningdit_from_authors(model)
    names = {"semantic_chans": "semantic_channels", "repa_depth": "align_depth"}
    return {ours: model[theirs] for theirs, ours in names.items() if type(model.get(theirs)) is int}


def _arguments(
    kind: Kind,
    tensors: Mapping[str, Tensor],
    stored: Arguments,
    num_heads: int | None,
    semantic_channels: int | None,
) -> Arguments:
    heads = num_heads or stored.get("num_heads")
    told = stored.pop("semantic_channels", None)
    semantic = semantic_channels or (stored["groups"]["sizes"][1] if "groups" in stored else told) or None
    try:
        _, inferred = infer_arguments(tensors, num_heads=heads, semantic_channels=semantic)
    except KeyError as missing:
        raise ValueError(f"some of its tensors are of the kind {kind}, but {missing.args[0]} is missing") from None
    except ValueError:
        return {}
    return inferred | {name: value for name, value in stored.items() if name != "align_depth" or name in inferred}
