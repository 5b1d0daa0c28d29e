"""Settings as overrides, grids of them, and the command that makes the same picture."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from configs import UserError, load_recipe
from flows.studio.command import command
from flows.studio.settings import cells, current, overrides, steps_of, values_of
from infra.artifacts import Artifact
from tasks.sampling.playing import laid_upon
from tests.helpers import builders

DEMO = load_recipe("demo")
OWN = {"guidance": 1.5, "steps": 12, "solver": "unipc", "Δt": 0.3}


def test_what_a_recipe_says_is_no_override() -> None:
    assert current(DEMO) == OWN and overrides(DEMO, OWN) == []
    asked = {"guidance": 4.0, "steps": 8, "solver": "heun", "Δt": 0.5}
    found = overrides(DEMO, asked)
    assert found == ["sample.guidance.scale=4", "sample.steps=8", "sample.solver=heun", "sample.delta=0.5"]
    assert current(load_recipe("demo", found)) == asked


def test_a_recipe_without_guidance_gets_some() -> None:
    plain = load_recipe("demo", ["sample.guidance.method=none"])
    assert current(plain)["guidance"] == 1.0
    (found,) = overrides(plain, {**OWN, "guidance": 3.0})
    assert load_recipe("demo", ["sample.guidance.method=none", found]).sample.guidance.scale == 3.0  # type: ignore[union-attr]


def test_resolutions_of_a_cascade() -> None:
    cascade = load_recipe("lowdiff_tiny")
    stages = steps_of(cascade)
    assert len(stages) > 1 and overrides(cascade, current(cascade), stages) == []
    fewer = [{**stages[0], "steps": stages[0]["steps"] + 4}, *stages[1:]]
    (found,) = overrides(cascade, current(cascade), fewer)
    assert steps_of(load_recipe("lowdiff_tiny", [found])) == fewer


def test_cells_of_a_grid_go_row_by_row() -> None:
    found = cells(DEMO, OWN, None, 7, ("guidance", [1.5, 4.0]), ("seed", [1, 2]))
    assert found == [([], 1), (["sample.guidance.scale=4"], 1), ([], 2), (["sample.guidance.scale=4"], 2)]
    with pytest.raises(UserError, match="Columns and rows are both steps"):
        cells(DEMO, OWN, None, 7, ("steps", [1]), ("steps", [2]))
    with pytest.raises(UserError, match="64 cells at most, asked for 90"):
        cells(DEMO, OWN, None, 7, ("steps", list(range(1, 10))), ("seed", list(range(10))))


def test_values_between_commas() -> None:
    assert values_of("steps", "4, 8,16") == [4, 8, 16] and values_of("solver", "heun") == ["heun"]
    for name, text in (("steps", "4.5"), ("guidance", "much"), ("seed", " , ")):
        with pytest.raises(UserError, match=f"{name}: expected values between commas"):
            values_of(name, text)


def _model(root: Path, *changes: str, name: str = "demo") -> Artifact:
    recipe = load_recipe("demo", list(changes))
    return builders.put(builders.at(root), recipe.model_copy(update={"name": name}), "train_dit", [])


def test_the_command_names_the_recipe_and_what_it_changes(tmp_path: Path) -> None:
    model = _model(tmp_path, "train_dit.images=64000", "sample.images=80")
    settings = ["sample.guidance.scale=4", "sample.delta=0.5"]
    parts = shlex.split(command(model, "5,7", 2, 3, settings, "a b.png"))
    assert parts[:4] == ["latentforge", "sample", "--recipe", "demo"] and parts[-2:] == ["--output", "a b.png"]
    sets = [value for name, value in pairwise(parts) if name == "--set"]
    again, wanted = load_recipe("demo", sets), laid_upon(model, settings)
    assert again.train_dit == wanted.train_dit and again.sample.guidance == wanted.sample.guidance
    assert again.sample.delta == 0.5 and parts[parts.index("--root") + 1] == str(tmp_path)


@pytest.mark.parametrize("name", ["demo_fewstep", "mine"])
def test_a_model_that_a_map_was_made_of_is_sampled_itself(tmp_path: Path, name: str) -> None:
    recipe = load_recipe("demo_fewstep").model_copy(update={"name": name})
    model = builders.put(builders.at(tmp_path), recipe, "train_dit", [])
    settings = ["sample.steps=20", "sample.guidance={method: classifier_free, scale: 2.5}"]
    wanted = laid_upon(model, settings)
    assert wanted.tune_fewstep is None and wanted.sample.steps == 20
    parts = shlex.split(command(model, "5", 1, 3, settings, "a.png"))
    sets = [value for flag, value in pairwise(parts) if flag == "--set"]
    again = load_recipe("demo_fewstep", sets)
    assert again.tune_fewstep is None and again.sample == wanted.sample


def test_a_recipe_of_ones_own_is_written_out_first(tmp_path: Path) -> None:
    model = _model(tmp_path, name="mine")
    first, second = command(model, "1", 1, 0, ["sample.steps=5"], "x.png").splitlines()
    assert first == f"latentforge artifacts show train_dit/train_dit --recipe --root {tmp_path} > model.yaml"
    assert "--recipe model.yaml" in second and "--set sample.steps=5" in second
