"""The probe: published loss where all fits, and a verdict that notices other statistics."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from configs import UserError, load_recipe
from flows.weights import app
from models.checkpoints import Checkpoint, write_authors
from tasks import encode, train_dit
from tasks.data.statistics import LatentStatistics
from tasks.networks import build_network
from tasks.stage import perform
from tasks.training import probe as probing
from tasks.training.probe import Latents, Probe, probe, ready_latents, stored_latents
from tests.helpers.builders import SMALL, at, context
from tests.helpers.published import save_latents
from tests.tasks.data.test_ready_latents import GIVEN


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A fresh network, whose velocity is zero everywhere."""
    recipe = load_recipe("demo_tiny", SMALL)
    network = build_network(recipe, recipe.train_dit.model)
    write_authors(tmp_path / "w.pt", Checkpoint("lightningdit", dict(network.state_dict())))
    return tmp_path / "w.pt"


def normal(recipe: object, count: int, scale: float = 1.0) -> Latents:
    side, (texture, semantic) = recipe.latent_size, recipe.channel_groups.values()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    columns = {
        name: (scale * torch.randn(count, channels, side, side)).half().numpy()
        for name, channels in (("z", texture), ("s", semantic))
    }
    unit = {name: {"mean": [0.0] * each.shape[1], "std": [1.0] * each.shape[1]} for name, each in columns.items()}
    return Latents(columns, np.zeros(count, np.int64), LatentStatistics(unit))


def test_the_loss_of_a_known_velocity(weights: Path) -> None:
    """Zero velocity on standard normal latents has the loss 2, whatever the time; on others 1 + their variance."""
    recipe = load_recipe("demo_tiny", [*SMALL, f"train_dit.pretrained={weights}"])
    found = probe(recipe, normal(recipe, 200))
    assert found.loss == pytest.approx(2, abs=0.05) and found.images == 200
    assert found.by_group == pytest.approx({"texture": 2, "semantic": 2}, abs=0.08)
    assert all(each is None or each == pytest.approx(2, abs=0.7) for row in found.by_time.values() for each in row)
    assert not found.fits and "or they are untrained" in found.verdict
    wide = probe(recipe, normal(recipe, 200, scale=3.0))
    assert wide.loss == pytest.approx(10, rel=0.03), "statistics of other latents are seen"


def test_what_is_known_without_learning() -> None:
    """Of independent normals the best velocity has the error 1 / (t² + (1 - t)²); here by regression."""
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    for t in (0.1, 0.5, 0.8):
        x = t * x1 + (1 - t) * x0
        v = x1 - x0
        slope = (x * v).mean() / x.square().mean()
        assert float((v - slope * x).square().mean()) == pytest.approx(1 / (t**2 + (1 - t) ** 2), rel=0.01)


def test_the_published_curve_is_that_of_one_recipe() -> None:
    theirs, sfd = load_recipe("lightningdit_xl_64ep"), load_recipe("sfd_xl_80ep")
    given = ["train_dit.pretrained=w.pt"]
    assert probing._published(load_recipe("lightningdit_xl_64ep", given)) == probing.PUBLISHED[80_000] == 0.3045
    assert probing._published(theirs) is not None and probing._published(sfd) is None
    fitting = Probe(64, 0.31, {}, {}, 1.7, 0.3045)
    assert fitting.fits and "fit" in fitting.verdict and "0.3045 at 80,000 steps" in fitting.verdict
    other = Probe(64, 0.5, {}, {}, 1.7, 0.3045)
    assert not other.fits and "statistics are others" in other.verdict


def test_published_losses_are_those_of_the_papers_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "papers.md").read_text()
    line = page[page.index("Reference loss curve") :].splitlines()[0]
    said = line.split("bs1024): ")[1].split(". ~")[0]
    pairs = dict(pair.split(": ") for pair in said.split("; "))
    scale = {steps: float(steps.removesuffix("k")) * (1000 if steps.endswith("k") else 1) for steps in pairs}
    assert {int(scale[steps]): pytest.approx(float(loss)) for steps, loss in pairs.items()} == probing.PUBLISHED


def test_ready_and_converted_latents_are_probed_alike(weights: Path, tmp_path: Path) -> None:
    source = f"data.source={{kind: latents, path: '{tmp_path}/shards'}}"
    recipe = load_recipe("demo_tiny", [*SMALL, source, *GIVEN, f"train_dit.pretrained={weights}"])
    save_latents(tmp_path / "shards", recipe, rows=(40,))
    made = perform(encode.STAGE, context(at(tmp_path), recipe, encode.STAGE).job)
    one, other = ready_latents(recipe, 40), stored_latents(made, 40)
    assert all(np.array_equal(one.columns[name], other.columns[name]) for name in ("z", "s"))
    assert np.array_equal(one.labels, other.labels) and len(stored_latents(made, 7).labels) == 7
    assert probe(recipe, one).loss == pytest.approx(probe(recipe, other).loss, rel=1e-6)
    assert math.isclose(probe(recipe, one).loss, 2, abs_tol=0.1), "standardised by their own statistics"


def test_the_command_and_the_line_before_a_training(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"data.source={{kind: latents, path: '{tmp_path}/shards'}}"
    given = [*SMALL, source, *GIVEN]
    recipe = load_recipe("demo_tiny", [*given, f"train_dit.pretrained={weights}"])
    save_latents(tmp_path / "shards", recipe, rows=(40,))
    options = [part for each in given for part in ("--set", each)]
    shown = CliRunner().invoke(
        app, ["probe", str(weights), "--recipe", "demo_tiny", "--images", "40", *options], catch_exceptions=False
    )
    assert shown.exit_code == 0 and "loss on 40 latents" in shown.output and "semantic" in shown.output
    assert "untrained" in shown.output.splitlines()[-1]
    made = perform(encode.STAGE, context(at(tmp_path), recipe, encode.STAGE).job)
    capsys.readouterr()
    train_dit._tell_loss(context(at(tmp_path), recipe, train_dit.STAGE, encode=made.fingerprint), made)
    assert "train_dit: before training, loss 2." in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing to probe"):
        probe(load_recipe("demo_tiny", given), ready_latents(recipe, 4))
