"""Pixel space: EDM's preconditioning, objective and steps in closed form, and the UNet that resolutions share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.cascade import TrainableCascade, no_condition
from models.cascade_unet import CascadeUNet
from models.checkpoints import load_into, read
from models.edm import DenoisingMatching, Preconditioning, sample, sigma_grid, sigma_of, time_of
from models.formats import build
from models.guidance import ClassifierFree
from tests.models.conftest import SMALL_UNET, stirred


def small_unet(**changes: Any) -> CascadeUNet:
    return stirred(CascadeUNet(**(SMALL_UNET | changes))).eval()  # type: ignore[return-value]


def ideal(x: torch.Tensor, t: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
    """The best denoiser of pixels that are N(0.2, 0.3²), each by itself."""
    variance = sigma_of(t.double()).square().view(-1, 1, 1, 1)
    return ((0.09 * x + variance * 0.2) / (0.09 + variance)).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------ EDM


def test_times_and_noise_levels_are_each_other() -> None:
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    torch.testing.assert_close(sigma_of(time_of(sigma)), sigma)


def test_preconditioning_keeps_little_noise_and_trusts_the_network_in_much() -> None:
    seen = {}

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        seen["std"], seen["label"] = float(x.std()), float(label[0])
        return torch.zeros_like(x)

    clean = 0.5 * torch.randn(64, 3, 16, 16)
    for level in (0.01, 0.5, 20.0):
        noisy = clean + level * torch.randn_like(clean)
        denoised = Preconditioning(0.5)(network, noisy, torch.full((64,), level))
        assert seen["std"] == pytest.approx(1.0, rel=0.02), "its input has unit variance at every level"
        assert seen["label"] == pytest.approx(math.log(level) / 4, abs=1e-6)
        torch.testing.assert_close(denoised, noisy * 0.25 / (level**2 + 0.25))


def test_a_perfect_network_has_unit_targets_and_no_loss_without_noise() -> None:
    """Weights and preconditioning together make the network's own target of unit variance: the loss of answering
    nothing is 1 at every level.
    """
    objective = DenoisingMatching()
    x1 = 0.5 * torch.randn(4096, 1, 4, 4)

    def silent(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return Preconditioning()(lambda scaled, label: torch.zeros_like(scaled), x, sigma_of(t[:, 0]))

    u, y = torch.rand(4096), torch.zeros(4096, dtype=torch.long)
    terms = objective.loss(silent, x1, y, torch.randn_like(x1), u)
    assert float(terms.total) == pytest.approx(1.0, rel=0.03)
    errors = terms.monitors["by_time/pixels"][1]
    low, high = (errors[order].mean() for order in (u < 0.2, u > 0.8))
    assert float(low) == pytest.approx(1.0, rel=0.1) and float(high) == pytest.approx(1.0, rel=0.1)
    levels = objective.sigmas(torch.rand(20_000)).log()
    assert float(levels.mean()) == pytest.approx(-1.2, abs=0.05) and float(levels.std()) == pytest.approx(1.2, abs=0.05)


def test_the_published_noise_levels() -> None:
    grid = sigma_grid(18)
    assert len(grid) == 19 and float(grid[0]) == pytest.approx(80.0) and float(grid[-2]) == pytest.approx(0.002)
    assert float(grid[1]) == pytest.approx(57.586, rel=1e-3) and grid[-1] == 0
    with pytest.raises(ValueError, match="at least 2"):
        sigma_grid(1)


def test_steps_reach_the_distribution_and_heun_does_it_better() -> None:
    noise, y = torch.randn(2000, 1, 2, 2, dtype=torch.float64), torch.zeros(2000, dtype=torch.long)
    calls = []

    def counting(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return ideal(x, t, labels)

    # Along the flow a pixel keeps its quantile: x = 0.2 + 0.3 z at the end of exact integration.
    exact = 0.2 + 0.3 * (noise * 80.0 - 0.2) / math.sqrt(80.0**2 + 0.09)
    heun = sample(counting, noise, y, sigma_grid(18))
    assert len(calls) == 35, "the published 35 evaluations of 18 steps"
    euler = sample(ideal, noise, y, sigma_grid(18), solver="euler")
    errors = [float((found - exact).square().mean().sqrt()) for found in (heun, euler)]
    assert errors[0] < 0.1 * 0.3 and errors[0] < 0.5 * errors[1], errors
    finer = float((sample(ideal, noise, y, sigma_grid(72)) - exact).square().mean().sqrt())
    assert finer < errors[0] / 8, "four times the steps of a method of second order"


# ----------------------------------------------------------------------------------------------------------- UNet


@pytest.mark.parametrize("side", [8, 16])
def test_each_resolution_has_its_own_doors_and_shares_the_rest(side: int) -> None:
    model = CascadeUNet(**SMALL_UNET).eval()
    x, y, t = torch.randn(2, 3, side, side), torch.tensor([0, 4]), torch.full((2, 1), 0.5)
    condition, level = torch.randn_like(x), torch.rand(2)
    module = TrainableCascade(model, DenoisingMatching())  # type: ignore[arg-type]
    given = {"x1_BCHW": x, "y_B": y, "noise_BCHW": torch.randn_like(x), "u_B": torch.rand(2)}
    found = module(**given, condition_BCHW=condition, level_B=level)
    assert {"total", "denoising", f"by_time/{side}/pixels"} <= found.keys()
    found["total"].backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    left = {name.split(".")[0] + "." + name.split(".")[1] for name, _ in model.named_parameters() if name not in used}
    if side == 16:
        assert left == {"doors_in.0", "doors_out.0"}
    else:
        assert left == {"unet.conv_in", "unet.down_blocks", "unet.up_blocks", "unet.conv_norm_out", "unet.conv_out"}
        shared = {"unet.down_blocks.1.", "unet.up_blocks.0.resnets", "unet.mid_block."}
        assert all(any(name.startswith(part) for name in used) for part in shared)
        assert not any(name.startswith(("unet.down_blocks.0.", "unet.up_blocks.1.")) for name in used)
    plain, nothing = model(x, t, y), no_condition(x)
    assert plain.shape == x.shape and torch.equal(model(x, t, y, *nothing), plain)
    torch.testing.assert_close(model(x, t, y, condition, torch.ones(2)), plain)  # zero weights at first


def test_labels_conditions_and_levels_matter_once_trained() -> None:
    model = small_unet()
    x, t, condition = torch.randn(2, 3, 8, 8), torch.full((2, 1), 0.5), torch.randn(2, 3, 8, 8)
    y, null = torch.tensor([0, 1]), torch.full((2,), model.null_label)
    outputs = [model(x, t, y), model(x, t, null), model(x, t, y, condition), model(x, t, y, condition, torch.ones(2))]
    for i, one in enumerate(outputs):
        assert all(not torch.allclose(one, other) for other in outputs[:i])
    guided = ClassifierFree(2.0, model.null_label)(model)(x, t, y)
    torch.testing.assert_close(guided, outputs[1] + 2.0 * (outputs[0] - outputs[1]))


@pytest.mark.parametrize("side", [8, 16])
def test_narrow_levels_hear_what_they_are_told(side: int) -> None:
    x, t, y = torch.randn(2, 3, side, side), torch.full((2, 1), 0.5), torch.tensor([0, 1])

    def difference(norm_channels: int) -> float:
        model = small_unet(multipliers=(1, 1), norm_channels=norm_channels)
        return (model(x, t, y) - model(x, t, y.flip(0))).abs().max().item()

    assert difference(4) > 1e-2
    assert difference(1) < 1e-5, "norms of single channels take away every shift; networks recorded with them stay so"


def test_files_from_before_norms_were_told_have_single_channels() -> None:
    stored = {**SMALL_UNET, "norm_channels": 1}
    before = {name: value for name, value in SMALL_UNET.items() if name != "norm_channels"}
    found, named = build("cascade_unet", before), build("cascade_unet", stored)
    assert found.unet.conv_norm_out.num_groups == named.unet.conv_norm_out.num_groups == 8
    assert build("cascade_unet", {**SMALL_UNET, "channels": 128}).unet.conv_norm_out.num_groups == 32


def test_weights_are_read_back_and_told_from_a_transformer_s(tmp_path: Path) -> None:
    """As a pretrained network or a weak guide."""
    model = small_unet()
    save_file(model.state_dict(), tmp_path / "unet.safetensors")
    found = read(tmp_path / "unet.safetensors")
    assert found.kind == "cascade_unet" and not found.arguments
    again = CascadeUNet(**SMALL_UNET).eval()
    load_into(again, found, "unet")
    x, t, y = torch.randn(1, 3, 16, 16), torch.full((1, 1), 0.5), torch.tensor([2])
    assert torch.equal(again(x, t, y), model(x, t, y))
    with pytest.raises(ValueError, match="does not fit"):
        load_into(CascadeUNet(**(SMALL_UNET | {"blocks": 2})), found, "unet")


def test_sizes_without_a_level_are_refused() -> None:
    for changes, named in (({"resolutions": (4, 16)}, "double"), ({"resolutions": (4, 8, 16)}, "no levels")):
        with pytest.raises(ValueError, match=named):
            CascadeUNet(**(SMALL_UNET | changes))
    with pytest.raises(ValueError, match=r"\(8, 16\)"):
        small_unet()(torch.randn(1, 3, 4, 4), torch.ones(1, 1), torch.tensor([0]))
