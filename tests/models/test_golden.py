"""The published models' numbers: every case in tests/golden, or in the directory named by LATENTFORGE_GOLDEN.

A case is a pair NAME.json (with its `kind`) and NAME.safetensors; further cases need no change here. They hold in
float32 throughout: with TF32 or bfloat16 published numbers are reached to those precisions only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from infra.device import computing
from models.clocks import SemanticFirst, Synchronous
from models.formats import autoencoder_from_authors, build, infer_arguments, lightningdit_from_authors
from models.groups import ChannelGroups, single_group
from models.guidance import AutoGuidance, ClassifierFree
from models.objectives import alignment_error, direction_error, velocity_error
from models.posterior import DiagonalGaussian
from models.solvers import sample
from models.tokenizer_losses import marginal_cosine, marginal_distance_matrix

GOLDEN = Path(os.environ.get("LATENTFORGE_GOLDEN") or Path(__file__).parents[1] / "golden")
METHODS = {"euler": "euler", "heun2": "heun", "dopri5": "dopri5"}


@pytest.fixture(autouse=True)
def in_full_float32() -> Iterator[None]:
    with computing("fp32", torch.device("cpu")):
        yield


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Largest deviation relative to the largest expected value."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    deviation = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    assert deviation <= tolerance, f"relative deviation {deviation:.2e}, allowed {tolerance:.0e}"


def inside(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def network(authors: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    model = build("lightningdit", lightningdit_from_authors(authors)).eval()
    model.load_state_dict(weights, strict=True)
    return model


def check_lightningdit(case: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    model = network(case["model"], inside(tensors, "w."))
    x, t, y = tensors["in.x"], tensors["in.t"], tensors["in.y"]
    close(model(x, t, y), tensors["out.velocity"])
    checked = {"out.velocity"}
    if "cfg" in case:
        cfg = case["cfg"]
        guided = ClassifierFree(
            cfg["scale"], cfg["null_label"], channels=cfg["channels"], interval=(cfg["interval_start"], 1.0)
        )(model)
        for side in ("above", "below"):
            name = f"out.cfg{cfg['channels']}_{side}"
            close(guided(x, torch.full((len(x), 1), cfg[f"t_{side}"]), y), tensors[name])
            checked.add(name)
    return checked


def check_wide_head(case: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    """Its times run from data to noise and its velocity with them."""
    model = build("lightningdit", case["model"]).eval()
    model.load_state_dict(inside(tensors, "w."), strict=True)
    close(-model(tensors["in.x"], 1 - tensors["in.t"], tensors["in.y"]), tensors["out.velocity"], tolerance=1e-5)
    return {"out.velocity"}


def check_sfd_model(case: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    model = network(case["model"], inside(tensors, "w."))
    groups: ChannelGroups = model.groups  # type: ignore[assignment]
    x, y = tensors["in.x"], tensors["in.y"]
    t = torch.stack([tensors["in.t_tex"], tensors["in.t_sem"]], dim=1)

    def times(clock: dict[str, float]) -> Tensor:
        return torch.tensor([[clock["t_tex"], clock["t_sem"]]]).expand(len(x), -1)

    close(model(x, t, y), tensors["out.velocity"])
    checked = {"out.velocity"}
    if "out.repa_projection" in tensors:
        velocity, projection = model.forward_with_alignment(x, t, y)  # type: ignore[operator]
        close(velocity, tensors["out.velocity"])
        close(projection.flatten(2).transpose(1, 2), tensors["out.repa_projection"])
        checked.add("out.repa_projection")
    if "cfg" in case:
        cfg = case["cfg"]
        guided = ClassifierFree(cfg["scale"], cfg["null_label"], interval=(cfg["interval_start"], 1.0), groups=groups)(
            model
        )
        for name in (n for n, value in cfg.items() if isinstance(value, dict)):
            close(guided(x, times(cfg[name]), y), tensors[f"out.cfg_{name}"])
            checked.add(f"out.cfg_{name}")
    if "autoguidance" in case:
        weak = network(case["autoguide_model"], inside(tensors, "ag."))
        for name in (n for n in tensors if n.startswith("out.autoguidance")):
            scale: float | tuple[float, ...] = case["autoguidance"]["scale"]
            if per_group := re.fullmatch(r"out\.autoguidance_sem([\dp]+)_tex([\dp]+)", name):
                semantic, texture = (float(number.replace("p", ".")) for number in per_group.groups())
                scale = (texture, semantic)
            guided = AutoGuidance(weak, scale, groups=groups)(model)
            close(guided(x, times(case["autoguidance"]), y), tensors[name])
            checked.add(name)
    return checked


def check_samplers(
    tensors: dict[str, Tensor], velocity: Callable[..., Tensor], clock: Any, groups: ChannelGroups
) -> set[str]:
    checked = set()
    for name, expected in tensors.items():
        if not (grid := re.fullmatch(r"out\.(euler|heun2|dopri5)_(\d+)_shift([\d.]+)", name)):
            continue
        method, points, shift = grid.group(1), int(grid.group(2)), float(grid.group(3))
        found = sample(
            velocity,
            tensors["in.x0"],
            torch.zeros(len(expected), dtype=torch.long),
            clock=clock,
            groups=groups,
            solver=METHODS[method],  # type: ignore[arg-type]
            steps=points,
            steps_are_points=True,
            shift=shift,
        )
        close(found, expected, 1e-3 if method == "dopri5" else 1e-4)
        checked.add(name)
    return checked


def check_flow(case: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    field = inside(tensors, "field.")

    def velocity(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
        bias = field["b"].view(1, -1, 1, 1) * t[..., None, None]
        return torch.tanh(torch.einsum("cd,bdhw->bchw", field["A"], x) + bias)

    x0, x1, t = tensors["in.x0"], tensors["in.x1"], tensors["in.t"][:, None]
    groups = single_group(x0.shape[1])
    weight = t.view(-1, 1, 1, 1)
    v = velocity(weight * x1 + (1 - weight) * x0, t, t)
    close(velocity_error(v, x1 - x0, groups), tensors["out.mse"])
    close(direction_error(v, x1 - x0), tensors["out.cosine"])
    return {"out.mse", "out.cosine"} | check_samplers(tensors, velocity, Synchronous(1), groups)


def check_sfd_flow(case: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    field = inside(tensors, "field.")

    def velocity(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
        # Summed in the order of the case's formula: where the masks switch, dopri5 amplifies rounding.
        texture = field["b"].view(1, -1, 1, 1) * t[:, :1, None, None]
        semantic = field["e"].view(1, -1, 1, 1) * t[:, 1:, None, None]
        return torch.tanh(torch.einsum("cd,bdhw->bchw", field["A"], x) + texture + semantic)

    x0, x1 = tensors["in.x0"], tensors["in.x1"]
    semantic = case["semantic_chans"]
    groups = ChannelGroups(("texture", "semantic"), (x0.shape[1] - semantic, semantic))
    clock = SemanticFirst(case["delta_t"])
    t = clock.train_times(tensors["in.t"])
    weight = groups.spread(t)
    v = velocity(weight * x1 + (1 - weight) * x0, t, t)
    close(velocity_error(v, x1 - x0, groups, (1.0, case["semantic_weight"])), tensors["out.mse"])
    close(direction_error(v, x1 - x0), tensors["out.cosine"])
    target = tensors["in.repa_target"]
    projection = tensors["in.repa_projection"].transpose(1, 2).unflatten(-1, target.shape[-2:])
    close(case["repa_weight"] * alignment_error(projection, target, case.get("repa_mode", "cos")), tensors["out.repa"])
    return {"out.mse", "out.cosine", "out.repa"} | check_samplers(tensors, velocity, clock, groups)


def check_vavae(case: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    authors = {name: value for name, value in case.items() if name not in ("kind", "note")}
    weights = inside(tensors, "w.")
    arguments = autoencoder_from_authors(authors)
    # The authors' arguments do not say whether the decoder attends (the MAR flavour does not); the tensors do.
    arguments["decoder_attention"] = infer_arguments(weights)[1]["decoder_attention"]
    model: Any = build("autoencoder", arguments).eval()
    model.load_state_dict(weights, strict=True)
    posterior: DiagonalGaussian = model.encode(tensors["in.x"])
    close(posterior.moments, tensors["out.moments"])
    close(posterior.mean, tensors["out.mean"])
    close(posterior.logvar, tensors["out.logvar"])
    close(posterior.kl(), tensors["out.kl"])
    close(model.decode(posterior.mean), tensors["out.recon"])
    return {"out.moments", "out.mean", "out.logvar", "out.kl", "out.recon"}


def check_vf_loss(case: dict[str, Any], tensors: dict[str, Tensor]) -> set[str]:
    terms = {"mcos": marginal_cosine, "mdms": marginal_distance_matrix}
    checked = set()
    for name, expected in tensors.items():
        if term := re.fullmatch(r"out\.(mcos|mdms)_m([\d.]+)", name):
            close(terms[term.group(1)](tensors["in.z"], tensors["in.f"], float(term.group(2))), expected)
            checked.add(name)
    return checked


CHECKS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], set[str]]] = {
    "lightningdit": check_lightningdit,
    "sfd_model": check_sfd_model,
    "wide_head": check_wide_head,
    "flow": check_flow,
    "sfd_flow": check_sfd_flow,
    "vavae": check_vavae,
    "vf_loss": check_vf_loss,
}


def discover(folder: Path) -> dict[str, str]:
    """{case: kind} of every case; a JSON file without a `kind` is a table, not a case."""
    kinds = {path.stem: json.loads(path.read_text()).get("kind") for path in sorted(folder.glob("*.json"))}
    return {name: kind for name, kind in kinds.items() if kind}


CASES = discover(GOLDEN)


def test_there_are_cases() -> None:
    assert CASES, f"no golden case in {GOLDEN}: expected pairs of NAME.json with a kind and NAME.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_golden_case(name: str) -> None:
    kind = CASES[name]
    assert kind in CHECKS, f"{name}.json has kind '{kind}', known kinds: {', '.join(CHECKS)}"
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    with torch.no_grad():
        checked = CHECKS[kind](case, tensors)
    # A reference that nobody compared would be a silent hole.
    assert checked == {key for key in tensors if key.startswith("out.")}
