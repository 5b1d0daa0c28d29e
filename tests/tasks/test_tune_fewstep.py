"""Stage `tune_fewstep`: the laws of training, given networks, samples of a few passes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from configs import Recipe, UserError, load_recipe
from infra.artifacts import Artifact
from models.flops import forward_flops
from tasks import sample, tune_fewstep
from tasks.loading.loader import Batch
from tasks.networks import build_flow_map
from tasks.plan import networks, trainings
from tasks.plan.data import images_of
from tasks.sampling.sampler import Sampler
from tasks.stage import perform
from tasks.training.flops import flops_per_image
from tasks.training.launch import train
from tasks.training.trainee import pieces
from tests.helpers.builders import at, context, put_networks, small_recipe

TUNED = "tune_fewstep={images: 48, batch: 8, learning_rate: 0.001, guidance: {method: classifier_free, scale: 2.0}}"
ALONE = ("compute.train.workers=1", "compute.train.engine=plain", "compute.train.checkpoint_every=16")
SAMPLED = ("sample.guidance={method: none}", "sample.steps=2")
STAGE = replace(tune_fewstep.STAGE, run=lambda context: train(context, context.recipe.tune_fewstep, alone=True))


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def recipe_of(*overrides: str) -> Recipe:
    return small_recipe(TUNED, *ALONE, *SAMPLED, *overrides)


def tuned(folder: Path, *overrides: str) -> Artifact:
    recipe = recipe_of(*overrides)
    if not (folder / "train_dit").exists():
        put_networks(at(folder), recipe)
    return perform(STAGE, STAGE.job(recipe, at(folder), {"train_dit": "train_dit"}))


def trainee_of(folder: Path) -> tune_fewstep.FlowMap:
    put_networks(at(folder), recipe_of())
    torch.manual_seed(0)
    return tune_fewstep.FlowMap(context(at(folder), recipe_of(), tune_fewstep.STAGE, "train_dit"))


def test_a_map_is_nearer_to_its_teachers_ends_than_the_teacher_is(tmp_path: Path) -> None:
    made = tuned(tmp_path, "tune_fewstep.images=160")
    curve = [value for _, value in made.manifest.facts["curves"]["total"]]
    assert curve[-1] < 0.8 * curve[0]


def test_interrupted_and_resumed_is_the_same_in_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tuned(tmp_path / "whole").read("ema.safetensors")
    plain = tune_fewstep.FlowMap.inputs

    def killed(self: tune_fewstep.FlowMap, batch: Batch, device: torch.device) -> dict[str, Any]:
        if batch.images_seen > 40:
            raise Killed
        return plain(self, batch, device)

    monkeypatch.setattr(tune_fewstep.FlowMap, "inputs", killed)
    with pytest.raises(Killed):
        tuned(tmp_path / "cut")
    monkeypatch.setattr(tune_fewstep.FlowMap, "inputs", plain)
    assert tuned(tmp_path / "cut").read("ema.safetensors") == whole


def test_accumulation_does_not_change_the_gradient(tmp_path: Path) -> None:
    whole, micro = tuned(tmp_path / "whole"), tuned(tmp_path / "micro", "compute.train.micro_batch=2")
    ours, others = (load(each.read("model.safetensors")) for each in (whole, micro))
    for name, value in ours.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-5, msg=name)


def test_two_workers_and_pieces_see_what_one_sees(tmp_path: Path) -> None:
    trainee, cpu = trainee_of(tmp_path), torch.device("cpu")
    for cursor, one in zip((0, 8), islice(trainee.loader.stream(), 2), strict=False):
        shares = [next(trainee.loader.stream(cursor, rank, 2)) for rank in range(2)]
        for name in ("positions", "labels"):
            assert np.array_equal(np.concatenate([getattr(each, name) for each in shares]), getattr(one, name))
        assert {each.images_seen for each in shares} == {one.images_seen}
    whole = trainee.inputs(one, cpu)
    for number, piece in enumerate(pieces(one, 4)):
        for name, value in trainee.inputs(piece, cpu).items():
            mine = value.unflatten(0, (3, 4))
            torch.testing.assert_close(mine, whole[name].unflatten(0, (3, 8))[:, 4 * number : 4 * number + 4])


def test_every_number_of_passes_is_learnt_from_one_of_its_steps(tmp_path: Path) -> None:
    trainee = trainee_of(tmp_path)
    given = trainee.inputs(next(trainee.loader.stream()), torch.device("cpu"))
    span = trainee.clock.span
    for row, evaluations in enumerate((1, 2, 4)):
        # Semantics, the last group, move from the start of time for one unit.
        t, until = (given[name].unflatten(0, (3, 8))[row, :, 1] for name in ("t_BG", "until_BG"))
        starts = torch.arange(evaluations) * span / evaluations
        assert all(any(abs(float(each) - min(1.0, float(start))) < 1e-5 for start in starts) for each in t)
        assert all(
            float(end) <= min(1.0, float(start) + span / evaluations) + 1e-5
            for start, end in zip(t, until, strict=True)
        )


def test_a_given_map_is_taken_as_it_is(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    file = tmp_path / "map.safetensors"
    file.write_bytes(made.read("ema.safetensors"))
    taken = tuned(tmp_path, "tune_fewstep.images=0", f"tune_fewstep.pretrained={file}")
    ours, theirs = (load(each.read(name)) for each, name in ((taken, "model.safetensors"), (made, "ema.safetensors")))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    tune_fewstep.check(recipe_of(f"tune_fewstep.pretrained={file}"))
    with pytest.raises(UserError, match=r"tune_fewstep\.pretrained"):
        tune_fewstep.check(recipe_of(f"tune_fewstep.pretrained={file}", "train_dit.model.hidden_size=56"))


def test_images_are_sampled_in_the_passes_that_were_asked_for(tmp_path: Path) -> None:
    made = tuned(tmp_path)
    found = {}
    for steps in (1, 2, 4):
        recipe = recipe_of(f"sample.steps={steps}")
        inputs = {"tune_fewstep": made.fingerprint}
        job = context(at(tmp_path), recipe, sample.STAGE, "train_vavae", "encode", "train_dit", **inputs)
        sample.check_statistics(job)
        sampler = Sampler.of(job)
        found[steps] = sampler.images(np.arange(6))[1]
        assert sampler.integrator.evaluations() == {"effective_evaluations": steps, "evaluations": steps}
        again = sampler.images(np.array([4, 1]))[1]
        assert np.abs(again.astype(int) - found[steps][[4, 1]].astype(int)).max() <= 1, "whatever their batch"
    assert not np.array_equal(found[1], found[2])


def test_the_plan_counts_what_a_built_map_and_its_teacher_cost(tmp_path: Path) -> None:
    recipe = recipe_of()
    section = recipe.tune_fewstep
    assert section is not None
    with torch.device("meta"):
        network = build_flow_map(recipe)
    cost = networks.flow_map(recipe)
    state = network.state_dict()
    assert (cost.values, cost.tensors) == (sum(each.numel() for each in state.values()), len(state))
    assert cost.flops == forward_flops(network)
    trainee, asked = trainee_of(tmp_path), []
    teacher = trainee.teacher
    trainee.teacher = counting(teacher, asked)
    trainee.inputs(next(trainee.loader.stream()), torch.device("cpu"))
    frozen = len(asked) * networks.diffusion(recipe, recipe.train_dit.model)[0].flops
    work = trainings.fewstep(recipe, images_of(recipe))
    assert work.flops.value == section.images * (flops_per_image(recipe, "tune_fewstep") + frozen)


def counting(network: Any, asked: list[int]) -> Any:
    class Counted(torch.nn.Module):
        def forward(self, *given: Any) -> Any:
            asked.append(1)
            return network(*given)

    return Counted()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tune_fewstep.steps=6"], "steps 6 is not a multiple of 4"),
        (["tune_fewstep.evaluations=[2, 1]"], "must rise"),
        (["tune_fewstep.validation={every: 8}"], "no held-out images"),
        (["sample.steps=3"], "sample.steps is 3 but tune_fewstep.evaluations"),
        (["sample.guidance={method: classifier_free, scale: 2.0}"], "brings its guidance along"),
        (["sample.solver=heun"], "takes even steps"),
        (["train_dit.objective.label_dropout=0.0"], r"tune_fewstep\.guidance\.method .*label_dropout is 0"),
        (["tune_fewstep.guidance.channels=90"], "channels is 90"),
        (["train_dit.cascade={sides: [2, 4]}"], "LightningDiT at one resolution"),
        (["tune_fewstep.optimizer=muon", "compute.train.zero_stage=1"], "tune_fewstep.optimizer is muon"),
        (["tune_fewstep.batch=7", "compute.train.workers=2"], "tune_fewstep.batch 7 does not divide"),
    ],
)
def test_what_cannot_be_is_refused_by_the_recipe(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_recipe("demo_tiny", [TUNED, *SAMPLED, *overrides])
