"""The whole chain of stages keeps the names of its artifacts (see tests/configs/fingerprints.py)."""

from __future__ import annotations

from configs import load_recipe
from flows.stages import STAGES
from flows.tokenizer_eval import STAGES as TOKENIZER_STAGES
from tests.configs import fingerprints


def test_no_stage_renamed_its_artifacts() -> None:
    dag = tuple(dict.fromkeys((*STAGES, *TOKENIZER_STAGES)))
    for name, table in fingerprints.recorded().items():
        assert fingerprints.stages(load_recipe(name), dag) == table["stages"], (
            f"{name}: a stage's version, sections or inputs changed, so its artifacts would be made anew. Is it meant? "
            "Then `python -m tests.configs.fingerprints`, and CHANGELOG.md says why."
        )
