"""Few-step sampling: a flow map that is learnt from a diffusion network's own samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.sampling import ClassifierFree, NoGuidance
from configs.section import Positive, Precision, Share
from configs.training import Training


class TuneFewstep(Training):
    """Its images are the teacher's, one for each number: of noise and a label, without data
    (`models/flow_map.py`)."""

    evaluations: tuple[Positive, ...] = (1, 2, 4)
    """Numbers of passes that an image may be sampled in; of each, one step of it is learnt from."""
    guidance: Annotated[NoGuidance | ClassifierFree, Field(discriminator="method")] = NoGuidance()
    """Of the teacher: the map learns the guided way and is sampled without a guide."""
    solver: Literal["euler", "heun", "dpmpp_2m", "unipc"] = "dpmpp_2m"
    steps: Positive = 8
    """Of the teacher's way from noise to data; a multiple of each of `evaluations`."""
    teacher_precision: Precision = "tf32"
    ema_decay: Share | None = 0.999

    @property
    def precisions(self) -> tuple[str, ...]:
        return self.precision, self.teacher_precision

    @model_validator(mode="after")
    def _steps_meet(self) -> TuneFewstep:
        if not self.evaluations or list(self.evaluations) != sorted(set(self.evaluations)):
            raise ValueError(f"evaluations {list(self.evaluations)} must rise: name each number of passes once")
        off = [each for each in self.evaluations if self.steps % each]
        if off:
            raise ValueError(
                f"steps {self.steps} is not a multiple of {off[0]}, one of evaluations: the map's steps "
                "begin and end at the teacher's"
            )
        if self.validation is not None:
            raise ValueError("validation is set but there are no held-out images where images are noise: leave it out")
        return self
