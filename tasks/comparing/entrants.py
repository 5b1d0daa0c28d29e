"""Many small trainings as items of one actor pool: an actor starts once and trains one model after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tasks import train_dit
from tasks.stage import Context, Job, Outcome, perform
from tasks.training.launch import train


class TrainingActor:
    """An actor that performs one `train_dit` job per call, as its only worker, and gives back the images seen."""

    def __call__(self, job: Mapping[str, Any]) -> int:
        return perform(_ALONE, Job(**job)).manifest.rows


def _run(context: Context) -> Outcome:
    return train(context, context.recipe.train_dit, alone=True)


_ALONE = replace(train_dit.STAGE, run=_run)
