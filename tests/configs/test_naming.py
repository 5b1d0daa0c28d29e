"""Names of runs tell what differs from the recipe, and nothing else."""

from __future__ import annotations

from configs import load_recipe, naming, recipe_names
from configs.naming import flat, run_name, said
from configs.sampling import Sample


def test_a_run_is_called_by_what_it_changes() -> None:
    assert run_name("demo_tiny") == "demo_tiny"
    assert run_name("demo_tiny", ["sample.guidance.scale=4"]) == "demo_tiny guidance.scale=4"
    changes = ["train_dit.images=999", "sample.steps=7", "compute.train.workers=2"]
    assert run_name("demo_tiny", changes) == "demo_tiny train_dit.images=999, steps=7"


def test_a_field_that_others_have_names_its_section() -> None:
    assert run_name("demo_tiny", ["sample.images=20", "train_dit.images=999"]) == (
        "demo_tiny train_dit.images=999, sample.images=20"
    )
    others = {
        name.rpartition(".")[2]
        for recipe in recipe_names()
        for name in flat(load_recipe(recipe).model_dump(mode="json"))
        if not name.startswith("sample.") and name.count(".") == 1
    }
    assert set(Sample.model_fields) & others == {*naming._ELSEWHERE, "solver", "steps"}


def test_what_is_laid_on_but_changes_nothing_is_not_told() -> None:
    steps = load_recipe("demo_tiny").sample.steps
    assert run_name("demo_tiny", [f"sample.steps={steps}"]) == "demo_tiny"


def test_long_values_and_many_fields_stay_readable() -> None:
    place = said("mine", {"data.source.path": "s3://bucket/somewhere/very/far/below/images"})
    assert place == "mine data.source.path=…re/very/far/below/images"
    many = said("mine", {f"sample.field{number}": number for number in range(6)})
    assert many == "mine field2=2, field3=3, field4=4, field5=5 and 2 more"
