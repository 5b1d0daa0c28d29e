"""What a recipe's paper reports, and under which settings. In no fingerprint: it says nothing about what is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.diffusion import StatisticsFiles
from configs.section import Positive, Section

if TYPE_CHECKING:
    from configs.recipe import Recipe

_GUIDANCE = "sample.guidance."
_KNOWN = {
    "fid": "fid",
    "sfid": "sfid",
    "inception_score": "inception_score",
    "precision": "precision_inception",
    "recall": "recall_inception",
    "rfid": "reconstruction_fid",
    "psnr": "reconstruction_psnr",
    "ssim": "reconstruction_ssim",
    "lpips": "reconstruction_lpips",
}
"""The paper's names of scores, and ours: by the standard Inception, those of pictures by ADM's evaluator."""


class Scores(Section):
    """One row of a table; what the paper does not give is left out."""

    fid: float | None = None
    fid_gpu: float | None = None
    """The same, measured again by the authors on GPUs where theirs were others; a run on GPUs is nearer to it."""
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    rfid: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    note: str | None = None
    """What others measured, or the authors on other hardware."""

    @property
    def named(self) -> dict[str, float]:
        """By the names that scores have in manifests and in MLflow."""
        return {ours: getattr(self, name) for name, ours in _KNOWN.items() if getattr(self, name) is not None}


class Baseline(Section):
    """What a cascade's speed is compared with."""

    of: str
    evaluations: Positive
    """Of the network at full resolution, for one image without guidance."""
    speedup: Annotated[float, Field(gt=1.0)] | None = None
    """What the paper claims at least: so many times its images a second."""


class Released(Section):
    """What the authors released: a run that takes it trains nothing (`configs/reproduction.py`)."""

    weights: str | None = None
    """Of the diffusion network, by path, fsspec URL or hub name."""
    statistics: StatisticsFiles | None = None
    """Of the latents that they were trained on."""
    tokenizer: str | None = None
    """In place of both: the tokenizer that the recipe is about. It is scored on validation images."""

    @model_validator(mode="after")
    def _whole(self) -> Released:
        both = self.weights is not None and self.statistics is not None
        if both == (self.tokenizer is not None) or (self.weights is None) != (self.statistics is None):
            raise ValueError("released names weights with their statistics, or a tokenizer: give one of the two")
        return self


class Published(Section):
    """Scores of generated pictures with and without guidance, of the tokenizer, and where they stand."""

    source: str = ""
    """Paper and table, or the authors' README."""
    data: Literal["imagenet-1k", "cifar-10", "ffhq"] | None = None
    """The set of images that it is about: a plan knows its size where the images are not here to be counted."""
    guided: Scores | None = None
    unguided: Scores | None = None
    tokenizer: Scores | None = None
    baseline: Baseline | None = None
    released: Released | None = None
    protocol: dict[str, Any] = Field(default_factory=dict)
    """Fields of `sample` and `evaluate` that the scores depend on, as `sample.steps`, with the published values. Those
    of `sample.guidance` count where the run is guided; None is what the paper does not say."""

    @model_validator(mode="after")
    def _scores_are_there(self) -> Published:
        scores = any(each is not None and each.named for each in (self.guided, self.unguided, self.tokenizer))
        if not scores and self.baseline is None and self.data is None:
            raise ValueError("there are no scores, no baseline and no data: give guided, unguided or tokenizer")
        if scores and not self.source:
            raise ValueError("source is not set: name the paper that the scores stand in")
        wrong = [name for name in self.protocol if not name.startswith(("sample.", "evaluate.", "evaluate_tokenizer."))]
        if wrong:
            raise ValueError(f"protocol names {wrong[0]}: expected fields of sample, evaluate or evaluate_tokenizer")
        return self


def scores_of_pictures(recipe: Recipe) -> Scores | None:
    """What the paper reports for pictures sampled as the recipe says: guided or not; None where it says nothing."""
    if recipe.published is None or recipe.lacks("sample"):
        return None
    return recipe.published.guided if _guided(recipe) else recipe.published.unguided


def scores_of_tokenizer(recipe: Recipe) -> Scores | None:
    """What the paper reports for reconstructions; None where it says nothing."""
    return None if recipe.published is None else recipe.published.tokenizer


def scores_of(stage: str, recipe: Recipe) -> Scores | None:
    """What the paper reports for what a scoring stage looks at; None where it says nothing."""
    of = {"evaluate": scores_of_pictures, "evaluate_tokenizer": scores_of_tokenizer}.get(stage)
    return None if of is None else of(recipe)


def published_metrics(scores: Scores | None) -> dict[str, float]:
    """As a tracker shows them beside ours: `published/fid` beside `fid`."""
    return {} if scores is None else {f"published/{name}": value for name, value in scores.named.items()}


@dataclass(frozen=True)
class Beside:
    """A published score and ours."""

    name: str
    published: float
    here: float | None
    """None where this run has none of that name."""

    @property
    def difference(self) -> float | None:
        return None if self.here is None else self.here - self.published


def beside(published: Scores | None, scores: Mapping[str, float]) -> list[Beside]:
    """Every published score with what a manifest's `scores` have."""
    known = {} if published is None else published.named
    return [Beside(name, value, scores.get(name)) for name, value in known.items()]


def departures(recipe: Recipe) -> list[str]:
    """Where the recipe's settings are not those of the published scores: a line for each field."""
    if recipe.published is None:
        return []
    guided, found = _guided(recipe), list[str]()
    for name, theirs in recipe.published.protocol.items():
        unsaid = theirs is None or (name.startswith(_GUIDANCE) and not guided)
        if unsaid or recipe.lacks(name.partition(".")[0]):
            continue
        ours = _value(recipe.model_dump(mode="json"), name)
        if ours != theirs:
            found.append(f"{name} is {_shown(ours)}, published with {_shown(theirs)}")
    return found


def _guided(recipe: Recipe) -> bool:
    return not recipe.lacks("sample") and recipe.sample.guidance.method != "none"


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _shown(value: Any) -> str:
    return "not set" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
