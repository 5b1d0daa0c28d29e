"""`latentforge init`: a recipe for one's own images, with what can be seen of them filled in."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs import UserError, load_recipe
from configs.data import Data, Shard
from flows.look import plain, section_of
from flows.options import writing
from tasks.sources import Account, listing_of, one_look, open_source

_TEST_IMAGES, _TEST_SHARE = 20, 0.3
"""So many of a small pile are kept for scores, but no larger share of it where that leaves enough to score at all."""
_FEWEST = 8
"""Images that a test split needs to be scored, and a pile twice as many."""
_SAMPLED = 600
_COLUMNS = 20
_FEW_TO_SCORE, _FEW_TO_JUDGE = 300, 8
"""Images of a test split below which scores say little, and below which a class's share of right labels does."""
_BUDGETS = {
    "train_vavae": (150, 8_000, 24_000),
    "train_semvae": (150, 6_000, 12_000),
    "train_dit": (300, 16_000, 80_000),
}
"""Images that a training sees: so often each one of the pile, but at least and at most so many.
Our choice: for a pile of a few hundred images and more a quarter more than the demo's diffusion model, and a tokenizer
that is aligned all the time, for as long as the demo's; with the other stages that is a quarter of an hour on two quiet
cores. For the smallest a quarter of the demo, in smaller batches."""
_RATE = 5.0e-3
"""The demo's, of its diffusion model."""
_LOGGED = 640
"""Images between two lines of a training; the demo's trainings see more."""
_BATCHES = {"train_vavae": 16, "train_semvae": 64, "train_dit": 64}
"""Of the demo; a batch is at most a quarter of the images to learn from."""


@dataclass(frozen=True)
class Proposal:
    """A recipe's text, and what a person should know of it."""

    text: str
    notes: tuple[str, ...]


def init(path: str, output: Path, test_path: str | None = None, overrides: Sequence[str] = ()) -> list[str]:
    """Write a recipe for the images at `path`; lines that say what was found, and the command that runs it.

    Raises:
        UserError: nothing is there, what is there cannot be learnt from, or `output` exists.
    """
    if output.exists():
        raise UserError(f"{output} exists: name another file with --output, or remove it")
    absolute = str(Path(path).resolve()) if Path(path).exists() else path
    data = section_of(absolute, test_path, None, overrides)
    with one_look():
        source = open_source(data)
        listing = listing_of(source)
    data = data.model_copy(update={"classes": max(1, len(listing.classes))})
    account = Account.of(data, listing, source.identity() if not listing.identity else "")
    found = propose(data, account, output.stem)
    with writing(output):
        output.write_text(found.text)
    try:
        recipe = load_recipe(str(output))
        faults = account.disagreements(recipe.data, recipe.shard, recipe)
        if faults:
            raise UserError("; ".join(faults))
    except UserError:
        output.unlink()
        raise
    return [
        *account.lines(data, recipe.shard),
        *(f"note      {note}" for note in found.notes),
        f"learnt    at {recipe.image.size} × {recipe.image.size} pixels; more takes a GPU: docs/one_gpu.md",
        f"recipe    {output}",
        f"run it    latentforge run sfd-full --recipe {shlex.quote(str(output))}",
    ]


def propose(data: Data, account: Account, name: str) -> Proposal:
    """The demo's networks with classes, counts, batches and budgets of these images."""
    classes, loose = data.classes, sum(account.splits.get("all", []))
    tested = sum(account.splits.get("test", [])) or sum(account.splits.get("validation", []))
    share = Shard().test_share
    if not tested:
        if loose < 2 * _FEWEST:
            raise UserError(f"{loose} images: {2 * _FEWEST} at least are needed, half to learn from and half to score")
        share = max(share, min(_TEST_SHARE, _TEST_IMAGES / loose), _FEWEST / loose)
        tested = max(1, round(share * loose)) if loose else 0
    learnt = sum(account.splits.get("train", [])) + loose - (tested if loose else 0)
    values: dict[str, Any] = {"extends": "demo", "data": plain(data)}
    if loose and share != Shard().test_share:
        values["shard"] = {"test_share": round(share, 2)}
    for stage, (times, least, most) in _BUDGETS.items():
        batch = _batch(_BATCHES[stage], learnt)
        images = min(most, max(least, times * learnt))
        values[stage] = {"images": images // batch * batch, "batch": batch}
        values[stage]["warmup_images"] = min(1_000, images // 16)
    if (share := values["train_dit"]["batch"] / _BATCHES["train_dit"]) < 1:
        values["train_dit"]["learning_rate"] = round(_RATE * share**0.5, 5)  # noisier gradients, shorter steps
    values["train_vavae"]["stages"] = []  # the demo's are of its own length
    values["compute"] = {"train": {"log_every": _LOGGED}}
    values["sample"] = {"images": max(1, round(_SAMPLED / classes)) * classes, "batch": min(100, classes * 10)}
    judged = classes > 1 and tested >= _FEW_TO_JUDGE * classes
    if not judged:
        values["evaluate"] = {"classifier": None, "classifier_frechet": False}
    values["report"] = {"title": name, "columns": min(classes, _COLUMNS)}
    notes = []
    if tested < _FEW_TO_SCORE:
        notes.append(f"{tested:,} images are kept for the scores: they will say little, and the report says how little")
    if not judged and classes > 1:
        notes.append(f"class consistency is left out: fewer than {_FEW_TO_JUDGE} test images a class cannot tell it")
    counts = account.counts()
    if counts and max(counts) > 4 * max(1, min(counts)):
        notes.append(f"classes hold {min(counts):,} to {max(counts):,} images; each is learnt as often as it is there")
    if classes > _COLUMNS:
        notes.append(f"the report pictures {_COLUMNS} of {classes} classes and names the others")
    head = (
        f"# {account.images:,} images in {classes} {'class' if classes == 1 else 'classes'}, as `latentforge init` saw "
        "them; `latentforge show --recipe` prints all that it leaves to the demo.\n"
        "# Better pictures: more images seen (train_dit.images first), then larger networks.\n"
        "# image.flips: true doubles what there is, where a mirrored picture is as good.\n"
    )
    return Proposal(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), tuple(notes))


def _batch(wanted: int, images: int) -> int:
    """The largest power of two that is not above `wanted` nor a quarter of the images; 1 at least."""
    batch = wanted
    while batch > max(1, images // 4):
        batch //= 2
    return max(1, batch)


def default_output(path: str) -> Path:
    """Beside the shell: named after the folder."""
    stem = path.rstrip("/").rpartition("/")[2].partition(".")[0] or "mine"
    return Path("".join(each if each.isalnum() or each in "-_" else "-" for each in stem) + ".yaml")
