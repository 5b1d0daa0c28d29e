"""A recipe's artifacts keep their names: new fields stay out of fingerprints, and no section changes unnoticed."""

from __future__ import annotations

import json
from typing import Annotated

import pytest

from configs import Recipe, UserError, load_recipe, recipe_names
from configs.load import merge, read_recorded, validate
from configs.section import Added, Section, fingerprinted, recorded
from tests.configs import fingerprints


class Inner(Section):
    width: int = 1
    mode: Annotated[str, Added(before="old")] = "new"


class Outer(Section):
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    extra: Annotated[Inner | None, Added(before=None)] = None
    sides: Annotated[tuple[int, ...], Added(before=())] = ()


def test_an_added_field_stays_out_while_it_holds_what_was_before() -> None:
    old = Outer(inner=Inner(mode="old"), parts=(Inner(width=2, mode="old"),))
    assert fingerprinted(old) == {"inner": {"width": 1}, "parts": [{"width": 2}]}


def test_an_added_field_enters_with_any_other_value_and_its_default_is_one() -> None:
    new = Outer(parts=(Inner(),), extra=Inner(mode="old"), sides=(2, 4))
    assert fingerprinted(new) == {
        "inner": {"width": 1, "mode": "new"},
        "parts": [{"width": 1, "mode": "new"}],
        "extra": {"width": 1},
        "sides": [2, 4],
    }


def test_what_was_recorded_before_a_field_held_what_was_before() -> None:
    older = Outer.model_validate_json('{"inner": {"width": 3}, "parts": [{"width": 2}, {"mode": "new"}]}')
    assert recorded(older) == Outer(
        inner=Inner(width=3, mode="old"), parts=(Inner(width=2, mode="old"), Inner(mode="new"))
    )
    for now in (Outer(), Outer(extra=Inner(), sides=(1,)), Outer(inner=Inner(mode="old"))):
        assert recorded(Outer.model_validate(now.model_dump())) == now
        named = json.dumps(fingerprinted(now))
        assert recorded(Outer.model_validate_json(named)) == now


@pytest.mark.parametrize("name", recipe_names())
def test_a_manifest_holds_every_value_of_a_recipe(name: str) -> None:
    recipe = load_recipe(name)
    values = recipe.model_dump(mode="json")
    assert validate(values) == recipe == read_recorded(values)
    model = values["train_vavae"]["model"]
    assert "identity" in model or model["kind"] == "diffusers"
    assert recipe.lacks("train_dit") or "cascade" in values["train_dit"]


def test_what_was_run_is_read_whatever_rules_came_later() -> None:
    values = merge(load_recipe("demo_tiny").model_dump(mode="json"), {"train_vavae": {"optimizer": "muon"}})
    assert read_recorded(values).train_vavae.optimizer == "muon"
    with pytest.raises(UserError, match=r"train_vavae\.optimizer is muon"):
        validate(values)
    with pytest.raises(UserError, match=r"train_vavae\.optimizer"):
        read_recorded(merge(values, {"train_vavae": {"optimizer": "newton"}}))


def _all() -> dict[str, Recipe]:
    return {name: load_recipe(name) for name in recipe_names()}


def test_no_recipe_changed_its_fingerprints() -> None:
    found = {name: fingerprints.sections(recipe) for name, recipe in _all().items()}
    expected = {name: table["sections"] for name, table in fingerprints.recorded().items()}
    changed = [
        f"{recipe}.{section}"
        for recipe in sorted({*found, *expected})
        for section in sorted({*found.get(recipe, {}), *expected.get(recipe, {})})
        if found.get(recipe, {}).get(section) != expected.get(recipe, {}).get(section)
    ]
    assert not changed, (
        f"{', '.join(changed)}: artifacts would be made anew. Is it a new field? Give it Added(before=…). Is it meant? "
        "Then `python -m tests.configs.fingerprints`, and CHANGELOG.md says why."
    )
