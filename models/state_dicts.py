"""Networks in what a checkpoint holds: under which keys, behind which prefixes, averaged or not.

Training codes nest state dicts (`{"model": …, "ema": …}`), put the names of wrappers before those of
tensors (`module.`, `_orig_mod.`, `model.diffusion_model.`), and keep averages of weights in half a
dozen ways. A network is found by the names of its own tensors, whatever stands before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from models.files import Foreign
from models.formats import ANCHORS, Kind

Tensors = dict[str, Tensor]

# Modules that wrap another one, anywhere in a name: DDP, torch.compile, FSDP, checkpointing, Lightning.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\."
)
_AVERAGE = re.compile(r"(?:^|[._])(?:ema|swa|shadow|averaged?|avg)(?:[._]|\d|$)", re.IGNORECASE)
_ONLINE = re.compile(r"(?:^|[._])online(?:[._]|$)")  # what ema-pytorch averages, beside its average
# latent-diffusion's averages: names without dots, and two counters beside them.
_LITEMA = re.compile(r"^(.*?)model_ema\.([^.]+)$")
# What is in the state dict of a network but is never averaged: tables that are not trained.
_TABLES = ("feat_rope.",)
_FROZEN = ("pos_embed",)
# Networks and losses that the authors' tokenizer files carry along.
_NOT_OURS = ("loss.", "foundation_model.")
_DEEP = 5
_USUAL = ("", "model", "state_dict", "model_state_dict", "params", "net", "network", "generator", "weights")
_OTHER_LAYOUTS = {
    "encoder.down_blocks.0.resnets.0.": "diffusers' AutoencoderKL, whose tensors have other names and shapes",
    "transformer_blocks.0.": "a transformer of diffusers, whose tensors have other names",
}


@dataclass(frozen=True)
class Found:
    """One network in a file."""

    kind: Kind
    where: str
    """Keys and prefix it lies under, joined by dots; empty for a flat file."""
    averaged: bool
    tensors: Tensors
    dropped: tuple[str, ...] = ()
    """Names beside it that belong to no network we know."""


def networks(values: Any) -> list[Found]:
    """Every network in the content of a file, averages after the weights that they are of."""
    found: list[Found] = []
    shadows: list[tuple[str, Any]] = []
    for where, state in _state_dicts(values):
        if "shadow_params" in state:
            shadows.append((where, state["shadow_params"]))
        found += _in_state_dict(where, _unwrapped(state))
    for where, listed in shadows:
        found += _from_list(where, listed, found)
    return found


def choose(found: list[Found], kind: Kind | None = None) -> tuple[Found, Found | None]:
    """The network to use, averaged where there is an average, and its weights without averaging
    where both are there. kind: the one that is wanted, None is the only one.

    Raises ValueError, naming what there is, where that is not one network.
    """
    kinds = list(dict.fromkeys(each.kind for each in found))
    if kind is None and len(kinds) > 1:
        raise ValueError(f"holds {_listed(found)}: say which one with --kind")
    own = [each for each in found if kind in (None, each.kind)]
    if not own:
        raise ValueError(f"holds {_listed(found)}, but a network of kind {kind} is wanted")
    averaged, raw = (_one([each for each in own if each.averaged is wanted]) for wanted in (True, False))
    return (averaged, raw) if averaged is not None else (raw, None)  # type: ignore[return-value]


def other_layout(values: Any) -> str | None:
    """What a file is whose networks are of our kinds, but by names that we do not read."""
    names = [name for _, state in _state_dicts(values) for name in state]
    return next((what for mark, what in _OTHER_LAYOUTS.items() if any(mark in name for name in names)), None)


def described(values: Any, foreign: tuple[str, ...] = ()) -> str:
    """What a file without a network that we know has in it, for an error."""
    if what := other_layout(values):
        return f"is {what}; give the original checkpoint that it was converted from"
    states = list(_state_dicts(values))
    names = [name for _, state in states for name in state]
    keys = ", ".join(str(key) for key in list(values)[:6]) if isinstance(values, Mapping) else ""
    said = [f"top keys {keys}"] if keys and any(where for where, _ in states) else []
    said.append(f"tensors such as {', '.join(names[:4])}" if names else "no tensors by name")
    if foreign:
        said.append(f"objects that were not built: {', '.join(foreign[:4])}")
    return f"these tensors belong to no network we know (LightningDiT, VA-VAE, Semantic VAE): {'; '.join(said)}"


# ----------------------------------------------------------------------------------------- finding


def _state_dicts(values: Any, where: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything that has tensors by name, however deep, with the keys that it lies under."""
    if isinstance(values, Foreign) and isinstance(values.state, Mapping) and "_parameters" in values.state:
        yield where, dict(_of_module(values))
        return
    if not isinstance(values, Mapping) or depth > _DEEP:
        return
    own = {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}
    shadow = values.get("shadow_params")
    if isinstance(shadow, (list, tuple)) and shadow:
        own["shadow_params"] = list(shadow)  # type: ignore[assignment]
    if own:
        yield where, own
    for key, value in values.items():
        if isinstance(value, (Mapping, Foreign)):
            yield from _state_dicts(value, f"{where}.{key}" if where else str(key), depth + 1)


def _of_module(pickled: Foreign, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The state dict of a whole network that was pickled."""
    state = pickled.state
    for part in ("_parameters", "_buffers"):
        for name, value in (state.get(part) or {}).items():
            if isinstance(value, Tensor) and name not in (state.get("_non_persistent_buffers_set") or ()):
                yield prefix + name, value
    for name, module in (state.get("_modules") or {}).items():
        if isinstance(module, Foreign) and isinstance(module.state, Mapping):
            yield from _of_module(module, f"{prefix}{name}.")


def _unwrapped(state: Mapping[str, Any]) -> Tensors:
    return {_WRAPPERS.sub("", name): value for name, value in state.items() if isinstance(value, Tensor)}


def _in_state_dict(where: str, tensors: Tensors) -> list[Found]:
    places: dict[str, Kind] = {}
    for kind in get_args(Kind):
        first, *others = ANCHORS[kind]
        for name in tensors:
            prefix = name.removesuffix(first)
            whole = prefix != name and (not prefix or prefix.endswith("."))
            if whole and all(prefix + other in tensors for other in others):
                places.setdefault(prefix, kind)
    shadow = [name for name in tensors if _LITEMA.match(name)]
    found, used = list[tuple[str, Kind, Tensors]](), set[str](shadow)
    for prefix, kind in places.items():
        inner = [each for each in places if each != prefix and each.startswith(prefix)]
        beside = (*inner, *(prefix + name for name in _NOT_OURS))
        names = [name for name in tensors if name.startswith(prefix) and not name.startswith(beside)]
        names = [name for name in names if name not in used]
        used.update(names)
        found.append((prefix, kind, {name.removeprefix(prefix): tensors[name] for name in names}))
    dropped = tuple(name for name in tensors if name not in used)
    made = []
    for prefix, kind, own in found:
        place = ".".join(part for part in (where, prefix.rstrip(".")) if part)
        average = bool(_AVERAGE.search(place)) and not _ONLINE.search(prefix)
        made.append(Found(kind, place, average, own, dropped))
        if averages := _litema(prefix, own, {name: tensors[name] for name in shadow}, place):
            made.append(Found(kind, f"{place}.model_ema".lstrip("."), True, own | averages, dropped))
    return made


def _litema(prefix: str, own: Tensors, shadow: Tensors, place: str) -> Tensors:
    """Averages under names without dots; which part of the prefix they keep depends on the code."""
    by_name = {_LITEMA.match(name)[2]: value for name, value in shadow.items()}  # type: ignore[index]
    parts = prefix.rstrip(".").split(".") if prefix else []
    best: Tensors = {}
    for cut in range(len(parts) + 1):
        head = "".join(parts[cut:])
        found = {name: by_name[key] for name in own if (key := head + name.replace(".", "")) in by_name}
        best = max(best, found, key=len)
    lacking = [name for name in own if name not in best and not name.startswith((*_TABLES, *_FROZEN, "linear_proj."))]
    if best and lacking:
        raise ValueError(
            f"averages (model_ema.*) beside {place or 'the weights'} lack {len(lacking)} of its tensors "
            f"(such as {lacking[0]}); take model_ema.* out of the file to use the weights themselves"
        )
    return best


def _from_list(where: str, listed: Any, found: list[Found]) -> list[Found]:
    """Averages that are kept as a list in the order of the parameters, of the network they fit."""
    shapes = [tuple(value.shape) for value in listed if isinstance(value, Tensor)]
    for each in found:
        parameters = [name for name in each.tensors if not name.startswith(_TABLES)]
        trained = [name for name in parameters if not name.startswith(_FROZEN)]
        for names in (parameters, trained):
            if not each.averaged and shapes == [tuple(each.tensors[name].shape) for name in names]:
                own = each.tensors | dict(zip(names, listed, strict=True))
                return [Found(each.kind, f"{where}.shadow_params".lstrip("."), True, own, each.dropped)]
    if found:
        raise ValueError(
            f"averages in {where or 'the file'} are a list of {len(shapes)} tensors that does not follow the order "
            "of the weights beside them; take them out of the file to use the weights themselves"
        )
    return []


# ---------------------------------------------------------------------------------------- choosing


def _one(found: list[Found]) -> Found | None:
    """The usual one of several; None where there is none. Raises ValueError where none is usual."""
    if len(found) < 2:
        return found[0] if found else None
    for usual in ("ema", *_USUAL):
        for each in found:
            if each.where == usual:
                return each
    raise ValueError(f"holds {_listed(found)}: keep one of them in the file")


def _listed(found: list[Found]) -> str:
    if not found:
        return "no network we know"
    return ", ".join(f"{each.kind} under {each.where or 'no key'}" for each in found)
