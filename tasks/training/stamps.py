"""What the files of weights that a stage writes say of themselves (`models.checkpoints.stamped`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs import Recipe
from configs.autoencoders import DiffusersModel, PythonModel
from models.checkpoints import FORMAT, TENSORS, stamped
from tasks.networks import kind_and_arguments
from tasks.snapshots import FOLDER as SNAPSHOTS
from tasks.stage import Context

_GROUPS = {"z": "texture", "s": "semantic"}


class Stamp:
    """Of one stage's run: tensors as safetensors in, the same with its metadata out.

    facts: of the trainee, which hold the statistics of its latents, where there are some. Nothing about workers,
        places or times is said: the same training writes the same bytes anywhere.
    """

    def __init__(self, context: Context, facts: Mapping[str, Any]) -> None:
        job = context.job
        self._made = {
            "stage": job.stage,
            "fingerprint": job.fingerprint,
            "recipe": context.recipe.name,
            "sections": job.sections,
        }
        self._others = _not_ours(context.recipe) if job.stage == "train_vavae" else ""
        kind, arguments = kind_and_arguments(context.recipe, job.stage)
        self._network: dict[str, Any] = {"kind": kind, "arguments": arguments, "nesting": []}
        if found := facts.get("statistics"):
            self._network["statistics"] = {
                _GROUPS[name]: {each: values[each] for each in ("mean", "std")} for name, values in found.items()
            }

    def network(self, data: bytes, file: str) -> bytes:
        """A whole network's weights."""
        if self._others:
            return self.tensors(data, self._others, file)
        return stamped(data, self._network | {"made": self._made | {"file": file}}, FORMAT)

    def tensors(self, data: bytes, kind: str, file: str) -> bytes:
        """What is no network by itself."""
        return stamped(data, {"kind": kind, "made": self._made | {"file": file}}, TENSORS)

    def snapshot(self, data: bytes, file: str) -> bytes:
        """What is stored while training goes on: a kept average is a network, a snapshot only a part of averages."""
        if file.startswith(f"{SNAPSHOTS}/"):
            return self.tensors(data, "a snapshot for averages of another width", file)
        return self.network(data, file)


def _not_ours(recipe: Recipe) -> str:
    """What a tokenizer is that `models.formats` does not build; empty where it does."""
    section = recipe.train_vavae.model
    if isinstance(section, DiffusersModel):
        return f"an {section.class_name} of diffusers, with its config.json beside it"
    if isinstance(section, PythonModel):
        return f"of a class of its own, {section.class_name}"
    return "no tokenizer: latents are pixels" if section.identity else ""
