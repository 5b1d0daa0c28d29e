"""What a recipe may ask of the loop beside plain training: precision, averages, validation, requests, traces."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.power_ema import Average, combination, exponent, new_share
from tasks.snapshots import kept_file, snapshot_file
from tasks.training.ema import averages
from tests.helpers.toy_training import BATCH, LAYOUTS, Run, Toy, near, notes, result, same, section, train

BROKEN = frozenset({6 * BATCH + 3})
LONG = 130
AVERAGES: dict[str, Any] = {
    "ema_decays": (0.5,),
    "ema_sigmas": (0.1, 0.2, 0.14),
    "snapshot_every": 3 * BATCH,
    "keep_averages_at": (4 * BATCH, 10 * BATCH),
}
VALIDATED: dict[str, Any] = {"validation": {"every": 2 * BATCH, "images": 40}}
STARTS: dict[str, Any] = {"start_from_average_at": (5 * BATCH, 9 * BATCH)}
KEEP_ALL: dict[str, Any] = {"checkpoint_every": BATCH, "keep_checkpoints": 100}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    fp16: dict[str, Any] = {"precision": "fp16"}
    small_step = {"learning_rate": 1e-12, "validation": {"every": 2 * BATCH, "images": 40, "patience": 4 * BATCH}}
    runs = [
        Run("whole", "whole"),
        Run("fp16", "fp16", KEEP_ALL, section=fp16),
        Run("fp16 stopped", "fp16 resumed", section=fp16, stop_at=9 * BATCH),
        Run("fp16 resumed", "fp16 resumed", section=fp16),
        Run("fp16 broken", "fp16 broken", section=fp16, broken=BROKEN),
        Run("fp16 overflow", "fp16 overflow", KEEP_ALL, section=fp16, broken=BROKEN, factor=30.0),
        Run("bf16", "bf16", section={"precision": "bf16"}),
        Run("long", "long", section={"images": LONG * BATCH}),
        Run(
            "exploding",
            "exploding",
            section={"images": LONG * BATCH},
            broken=frozenset({120 * BATCH + 1}),
            factor=1e4,
        ),
        Run("averages", "averages", KEEP_ALL, section=AVERAGES),
        Run("averages stopped", "averages resumed", section=AVERAGES, stop_at=9 * BATCH),
        Run("averages resumed", "averages resumed", section=AVERAGES),
        Run("every step", "every step", KEEP_ALL),
        Run("starts", "starts", KEEP_ALL, section=STARTS),
        Run("validated", "validated", {"keep_checkpoints": 1}, section=VALIDATED),
        Run("validated stopped", "validated resumed", section=VALIDATED, stop_at=9 * BATCH),
        Run("validated resumed", "validated resumed", section=VALIDATED),
        Run("impatient", "impatient", section=small_step),
        Run("asked to leave", "left", ask="leave"),
        Run("back", "left"),
        Run("asked to save", "saved", {"keep_checkpoints": 9}, ask="save"),
        Run("asked for a trace", "trace", ask="profile"),
        Run("traced", "traced", {"profile_at": 2 * BATCH}),
    ]
    train(1, folder, runs)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    runs = []
    for name, knobs in LAYOUTS.items():
        runs += [
            Run(name, name, knobs),
            Run(f"{name} fp16", f"{name} fp16", knobs, section={"precision": "fp16"}),
            Run(f"{name} bf16 sent", f"{name} bf16 sent", knobs | {"communication": "bf16"}),
            Run(f"{name} validated", f"{name} validated", knobs, section=VALIDATED),
            Run(f"{name} starts", f"{name} starts", knobs, section=STARTS),
        ]
    bucket = {"zero_optimization": {"reduce_bucket_size": 100}}
    runs += [
        Run("bucket", "bucket", LAYOUTS["zero2"] | {"deepspeed": bucket}),
        Run("signalled", "signalled", {"keep_checkpoints": 9}, signal_at=6 * BATCH),
    ]
    train(2, folder, runs)
    return folder


def values(folder: Path, place: str, images: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / place / "checkpoints" / f"{images:014d}" / "values.json").read_text())
    return found


def saved(folder: Path, place: str) -> list[int]:
    return sorted(int(path.name) // BATCH for path in (folder / place / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------ precision


def test_a_float16_overflow_is_left_out_and_no_event(one: Path) -> None:
    before, after = (values(one, "fp16 overflow", images * BATCH)["optimizer"] for images in (6, 7))
    assert after["scale"] == before["scale"] / 2
    assert after["steps"] == before["steps"]
    near(result(one, "fp16 overflow"), result(one, "fp16 broken"), rtol=1e-3, atol=1e-4)
    said = (one / "said.txt").read_text()
    assert said.count("guard: skip") == 2, "of the runs fp16 broken and exploding"


def test_float16_resumes_in_every_bit(one: Path) -> None:
    assert same(result(one, "fp16 resumed"), result(one, "fp16"))


def test_a_loss_that_is_not_finite_is_no_overflow(one: Path) -> None:
    assert all(value.isfinite().all() for name, value in result(one, "fp16 broken").items() if name != "curve")
    assert (
        f"guard: skip: loss or gradient not finite or exploding at image {6 * BATCH:,}"
        in (one / "said.txt").read_text()
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_engine_trains_in_float16(one: Path, two: Path, name: str) -> None:
    near(result(two, f"{name} fp16"), result(one, "fp16"), rtol=0.03, atol=3e-3)


def test_half_precision_is_near_float32(one: Path) -> None:
    for name in ("fp16", "bf16"):
        curve, exact = result(one, name)["curve"], result(one, "whole")["curve"]
        torch.testing.assert_close(curve, exact, rtol=0.1, atol=0.0)
        assert not torch.equal(curve, exact)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_may_travel_in_bfloat16(two: Path, name: str) -> None:
    rounded, exact = result(two, f"{name} bf16 sent"), result(two, name)
    near(rounded, exact, rtol=0.05, atol=5e-3)
    assert not same(rounded, exact)


def test_deepspeed_takes_what_the_recipe_adds(two: Path) -> None:
    near(result(two, "bucket"), result(two, "zero2"))


def test_an_exploding_step_is_left_out(one: Path) -> None:
    exploding = result(one, "exploding")
    assert f"image {120 * BATCH:,}" in (one / "said.txt").read_text()
    near(exploding, result(one, "long"), rtol=0.1, atol=0.05)


# ------------------------------------------------------------------------------------------------ averages


def weights_of_every_step(folder: Path) -> list[dict[str, Tensor]]:
    found = [load_file(path / "weights.safetensors") for path in sorted((folder / "averages/checkpoints").iterdir())]
    end = result(folder, "averages")
    return [*found, {name.removeprefix("weights/"): end[name] for name in end if name.startswith("weights/")}]


@pytest.mark.parametrize("name", ["decay-0.5", "sigma-0.1", "sigma-0.2"])
def test_averages_follow_their_formulas(one: Path, name: str) -> None:
    steps = weights_of_every_step(one)
    assert len(steps) == 12
    kind, value = name.split("-")
    torch.manual_seed(section().seed)
    expected = {each: tensor.detach().clone() for each, tensor in Toy().state_dict().items() if each != "scale"}
    for number, weights in enumerate(steps):
        share = 1 - float(value) if kind == "decay" else new_share(exponent(float(value)), number, number + 1)
        expected = {each: old + share * (weights[each] - old) for each, old in expected.items()}
    found = result(one, "averages")
    for each, tensor in expected.items():
        torch.testing.assert_close(found[f"ema-{name}/{each}"], tensor, rtol=1e-5, atol=1e-7)


def test_averages_resume_in_every_bit(one: Path) -> None:
    assert same(result(one, "averages resumed"), result(one, "averages"))
    for path in (one / "averages" / "snapshots").iterdir():
        assert path.read_bytes() == (one / "averages resumed" / "snapshots" / path.name).read_bytes(), path.name


def test_averages_are_kept_where_the_recipe_says(one: Path) -> None:
    """Each is the average of the checkpoint there, with what is never trained, under the network's own names."""
    for folder in ("averages", "averages resumed"):
        kept = sorted((one / folder / "averages").iterdir())
        assert [path.name for path in kept if path.suffix == ".safetensors"] == [
            f"{images * BATCH:014d}.safetensors" for images in (4, 10)
        ]
    for images in (4, 10):
        stored = load_file(one / "averages" / kept_file(images * BATCH))
        whole = load_file(one / "averages" / "checkpoints" / f"{images * BATCH:014d}" / "ema.safetensors")
        assert set(stored) == set(Toy().state_dict())
        assert all(torch.equal(stored[name], tensor) for name, tensor in whole.items())
        assert load_file(one / "averages resumed" / kept_file(images * BATCH)).keys() == stored.keys()


def test_training_goes_on_from_the_average(one: Path) -> None:
    """Until there it is as it would be without; there weights are the average, and moments stay."""

    def stored(place: str, steps: int, part: str) -> dict[str, Tensor]:
        return load_file(one / place / "checkpoints" / f"{steps * BATCH:014d}" / f"{part}.safetensors")

    def trained(place: str, steps: int) -> dict[str, Tensor]:
        return {n: value for n, value in stored(place, steps, "weights").items() if n != "scale"}

    assert same(trained("starts", 4), trained("every step", 4))
    assert same(trained("starts", 5), stored("every step", 5, "ema"))
    assert not same(trained("every step", 5), stored("every step", 5, "ema"))
    for part in ("ema", "exp_avg", "exp_avg_sq"):
        assert same(stored("starts", 5, part), stored("every step", 5, part)), part
    assert same(trained("starts", 9), stored("starts", 9, "ema"))
    assert not same(trained("starts", 6), stored("starts", 6, "ema"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_engine_goes_on_from_the_average(one: Path, two: Path, name: str) -> None:
    near(result(two, f"{name} starts"), result(one, "starts") | {"curve": result(two, f"{name} starts")["curve"]})


def test_a_start_from_no_average_is_refused() -> None:
    with pytest.raises(ValueError, match="start_from_average_at names images but ema_decay is not set"):
        section(ema_decay=None, **STARTS)
    with pytest.raises(ValueError, match="start_from_average_at names 40: expected multiples of batch 16"):
        section(start_from_average_at=(40,))


@pytest.mark.parametrize(("seen", "halflife"), [(0, 0.0), (512, 25.6), (4_000_000, 200_000.0), (40_000_000, 500_000.0)])
def test_averages_ramp_up_as_edms(seen: int, halflife: float) -> None:
    """A half-life of half a million images, and no more than 5 % of those seen (Karras et al. 2022)."""
    decay = 0.5 ** (512 / 500_000)
    asked = section(ema_decay=decay, ema_rampup=0.05)
    share = averages(asked, {"w": torch.zeros(1)})["ema"].share(seen, seen + 512)
    expected = 1.0 if not halflife else 1 - 0.5 ** (512 / halflife)
    assert share == pytest.approx(expected)
    assert averages(section(ema_decay=decay), {"w": torch.zeros(1)})["ema"].share(0, 512) == pytest.approx(1 - decay)


def test_another_average_comes_from_snapshots(one: Path) -> None:
    stored = [(images * BATCH, sigma) for images in (3, 6, 9, 12) for sigma in (0.1, 0.2)]
    files = {Average(*each): one / "averages" / snapshot_file(*each) for each in stored}
    shares = combination(list(files), Average(12 * BATCH, 0.14))
    tracked = result(one, "averages")
    parts = [load_file(path) for path in files.values()]
    for name in parts[0]:
        made = sum(float(share) * part[name] for share, part in zip(shares, parts, strict=True))
        wanted = tracked[f"ema-sigma-0.14/{name}"]
        away = (wanted - tracked[f"weights/{name}"]).norm()
        assert torch.is_tensor(made) and (made - wanted).norm() < 0.15 * away, name


# ----------------------------------------------------------------------------------------------- callbacks


def test_validation_changes_nothing(one: Path) -> None:
    validated, whole = result(one, "validated"), result(one, "whole")
    assert same({name: validated[name] for name in whole}, whole)
    assert same(result(one, "validated resumed"), validated)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_engine_validates_alike_and_trains_on(one: Path, two: Path, name: str) -> None:
    validated, plain = result(two, f"{name} validated"), result(two, name)
    assert same({each: validated[each] for each in plain}, plain)
    torch.testing.assert_close(validated["validation"], result(one, "validated")["validation"], rtol=1e-4, atol=1e-6)


def test_the_best_checkpoint_stays(one: Path) -> None:
    scores = result(one, "validated")["validation"]
    best = int(scores[scores[:, 1].argmin(), 0])
    assert best // BATCH in saved(one, "validated")
    kept = load_file(one / "validated" / "checkpoints" / f"{best:014d}" / "ema.safetensors")
    assert all(torch.equal(result(one, "validated")[f"best/{name}"], tensor) for name, tensor in kept.items())


def test_training_stops_when_patience_ends(one: Path) -> None:
    scores = result(one, "impatient")["validation"]
    assert scores[:, 0].tolist() == [2 * BATCH, 4 * BATCH, 6 * BATCH]
    assert f"stopping at {6 * BATCH:,} images" in (one / "said.txt").read_text()


def test_asked_to_leave_it_saves_and_goes_on_next_time(one: Path) -> None:
    said = (one / "asked to leave.error").read_text()
    assert said.startswith(f"Left: saved at {BATCH:,} images")
    assert same(result(one, "back"), result(one, "whole"))


def test_asked_to_save_it_saves_at_the_next_look(one: Path) -> None:
    assert saved(one, "saved") == [1, 4, 8]
    assert not list((one / "saved" / "requests").iterdir())
    assert same(result(one, "asked to save"), result(one, "whole"))


def test_a_signal_to_one_worker_saves_in_all(two: Path) -> None:
    assert saved(two, "signalled") == [4, 6, 8]
    assert same(result(two, "signalled"), result(two, "plain"))


@pytest.mark.parametrize(("place", "name"), [("trace", "asked for a trace"), ("traced", "traced")])
def test_a_trace_on_demand(one: Path, place: str, name: str) -> None:
    (trace,) = (one / place / "profiles").iterdir()
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    assert any("backward" in str(event.get("name", "")).lower() for event in events)
    assert same(result(one, name), result(one, "whole"))


def test_metrics_of_all_workers_are_logged(one: Path, two: Path) -> None:
    alone, together = notes(one, "whole"), notes(two, "plain")
    assert {"images_per_second_per_device", "data_wait_share", "peak_memory_mib", "left_out"} <= alone.keys()
    for name in alone:
        if name.startswith(("loss/", "when/", "gradient_norm")):
            assert [step for step, _ in together[name]] == [step for step, _ in alone[name]]
            np.testing.assert_allclose(np.array(together[name]), np.array(alone[name]), rtol=1e-4)
    errors = [value for name, points in alone.items() if name.startswith("when/error/") for _, value in points]
    assert len(errors) > 12, "several bins"
