"""The cascade: published weights start unchanged, positions scale, every resolution uses every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from models.cascade import Cascade, Conditioned, TrainableCascade, no_condition
from models.cascade_dit import CascadeDiT
from models.checkpoints import Checkpoint, load_into, read, write
from models.clocks import SemanticFirst
from models.flops import forward_flops
from models.formats import build, lightningdit_from_authors
from models.guidance import AutoGuidance, ClassifierFree
from models.layers import RotaryTable, cell_centres, sincos_positions
from models.objectives import VelocityMatching
from tests.models.conftest import PAIR, stirred

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = ("lightningdit_base", "lightningdit_qknorm_patch2", "sfd_model")
ARGUMENTS: dict[str, Any] = {
    "resolutions": (2, 4, 8),
    "in_channels": 6,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "groups": PAIR,
    "qk_norm": True,
}


def small_cascade(**changes: Any) -> CascadeDiT:
    return stirred(CascadeDiT(**(ARGUMENTS | changes)))  # type: ignore[return-value]


def batch(side: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(count, 6, side, side, generator=generator)
    return x, torch.rand(count, 2, generator=generator), torch.arange(count)


# ------------------------------------------------------------------------------------------------------ positions


def test_positions_are_centres_counted_in_the_finest_cells() -> None:
    assert cell_centres(4).tolist() == [0, 1, 2, 3]
    assert cell_centres(2, 4).tolist() == [0.5, 2.5]
    assert cell_centres(1, 4).tolist() == [1.5]


def test_tables_of_the_finest_grid_are_the_stock_ones() -> None:
    assert torch.equal(sincos_positions(16, 8, finest=8), sincos_positions(16, 8))
    assert torch.equal(RotaryTable(8, 8, finest=8).freqs_cos, RotaryTable(8, 8).freqs_cos)


def test_rotary_angles_span_the_same_distances_at_every_resolution() -> None:
    """Neighbours on the coarse grid are as far apart as every second cell of the fine one."""
    fine, coarse = RotaryTable(8, 8), RotaryTable(8, 4, finest=8)
    query, key = torch.randn(8), torch.randn(8)

    def score(table: RotaryTable, a: int, b: int) -> torch.Tensor:
        rows = len(table.freqs_cos)
        turned_q, turned_k = table(query.expand(rows, 8)), table(key.expand(rows, 8))
        return turned_q[a] @ turned_k[b]

    torch.testing.assert_close(score(coarse, 0, 1), score(fine, 0, 2))
    torch.testing.assert_close(score(coarse, 0, 4), score(fine, 0, 16))


# ---------------------------------------------------------------------------------------------- published weights


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_load_and_start_unchanged(name: str) -> None:
    case, tensors = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    weights = {key.removeprefix("w."): value for key, value in tensors.items() if key.startswith("w.")}
    arguments = lightningdit_from_authors(case["model"])
    plain: Any = build("lightningdit", arguments).eval()
    plain.load_state_dict(weights)
    sides = [arguments["input_size"] // 2, arguments["input_size"]]
    cascade: Any = build("lightningdit", arguments | {"resolutions": sides}).eval()
    load_into(cascade, Checkpoint("lightningdit", weights), name)
    assert {key.split(".")[0] for key in cascade.state_dict().keys() - weights.keys()} == {
        added.rstrip(".") for added in CascadeDiT.added
    }
    x, y = tensors["in.x"], tensors["in.y"]
    t = tensors["in.t"] if "in.t" in tensors else torch.stack([tensors["in.t_tex"], tensors["in.t_sem"]], dim=1)
    with torch.no_grad():
        expected = plain(x, t, y)
        assert torch.equal(cascade(x, t, y), expected)
        assert torch.equal(cascade(x, t, y, torch.randn_like(x), torch.rand(len(x))), expected)


def test_a_cascade_does_not_load_into_a_plain_network_nor_with_published_tensors_missing(tmp_path: Path) -> None:
    cascade = small_cascade()
    write(tmp_path / "cascade.safetensors", Checkpoint("lightningdit", cascade.state_dict(), {}))
    found = read(tmp_path / "cascade.safetensors")
    again = small_cascade()
    load_into(again, found, "cascade")
    assert torch.equal(again(*batch(2)), cascade(*batch(2)))
    del found.tensors["blocks.0.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"1 tensors missing .*qkv"):
        load_into(again, found, "cascade")
    plain = {name: value for name, value in ARGUMENTS.items() if name != "resolutions"} | {"input_size": 8}
    with pytest.raises(ValueError, match="unknown"):
        load_into(build("lightningdit", plain), found, "cascade")


# -------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("side", [2, 4, 8])
def test_every_resolution_has_a_velocity_of_its_own_side(side: int) -> None:
    model, (x, t, y) = small_cascade(), batch(side)
    found = model(x, t, y)
    assert found.shape == x.shape
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), found[1:2])
    given = torch.randn_like(x)
    low, high = (model(x, t, y, given, torch.full((3,), level)) for level in (0.0, 0.5))
    assert not torch.allclose(low, found) and not torch.allclose(low, high)
    assert torch.equal(low, model(x, t, y, given)), "a condition without a level is clean"
    nothing = no_condition(x)
    assert torch.equal(model(x, t, y, *nothing), found), "no condition is zeros at level 1"


def test_resolutions_differ_by_more_than_their_size() -> None:
    """A constant picture looks the same at all sides; the network knows them apart."""
    model = small_cascade(rope=False)
    with torch.no_grad():
        for index in range(2):
            model.get_buffer(f"coarse_positions_{index}").zero_()
        model.pos_embed.zero_()
        outputs = [model(torch.ones(1, 6, side, side), torch.full((1, 2), 0.5), torch.tensor([0])) for side in (2, 4)]
        assert not torch.allclose(outputs[0][..., 0, 0], outputs[1][..., 0, 0])
        model.resolution_embedder.weight.zero_()
        outputs = [model(torch.ones(1, 6, side, side), torch.full((1, 2), 0.5), torch.tensor([0])) for side in (2, 4)]
    torch.testing.assert_close(outputs[0][..., 0, 0], outputs[1][..., 0, 0])


def test_wrong_sides_and_conditions_are_refused() -> None:
    model, (x, t, y) = small_cascade(), batch(4)
    with pytest.raises(ValueError, match=r"\(2, 4, 8\)"):
        model(x[..., :3, :3], t, y)
    with pytest.raises(ValueError, match="condition of the shape"):
        model(x, t, y, x[..., :2, :2])
    for resolutions, named in (((4, 2), "rise"), ((4, 4), "rise"), ((3, 8), "multiples of patch_size")):
        with pytest.raises(ValueError, match=named):
            CascadeDiT(**(ARGUMENTS | {"resolutions": resolutions, "patch_size": 2 if 3 in resolutions else 1}))
    with pytest.raises(ValueError, match="input_size"):
        CascadeDiT(**ARGUMENTS, input_size=16)


@pytest.mark.parametrize("side", [2, 4, 8])
def test_flops_at_every_side_are_those_torch_counts(side: int) -> None:
    with torch.device("meta"):
        model = CascadeDiT(**ARGUMENTS).eval()
        x, t, y = torch.empty(1, 6, side, side), torch.empty(1, 2), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y)
    assert forward_flops(model, side=side) == counter.get_total_flops()


# ---------------------------------------------------------------------------------------------- between the sides


def test_lowered_is_the_average_and_raised_keeps_it() -> None:
    cascade = Cascade((2, 4, 8))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(cascade.lowered(x, 8), x)
    torch.testing.assert_close(cascade.lowered(cascade.lowered(x, 4), 2), cascade.lowered(x, 2))
    torch.testing.assert_close(cascade.lowered(x, 4)[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    assert (cascade.below(8), cascade.below(2)) == (4, None)
    for upsample in ("bilinear", "nearest"):
        raised = Cascade((2, 8), upsample).raised(torch.full((1, 3, 2, 2), 1.5), 8)  # type: ignore[arg-type]
        assert raised.shape == (1, 3, 8, 8) and torch.equal(raised, torch.full_like(raised, 1.5))
    for sides, upsample in (((4, 2), "bilinear"), ((3, 8), "bilinear"), ((4, 8), "cubic")):
        with pytest.raises(ValueError, match=r"sides|upsample"):
            Cascade(sides, upsample)  # type: ignore[arg-type]


def test_a_condition_loses_what_its_level_says() -> None:
    cascade = Cascade((4, 8), "nearest")
    lower, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    found = cascade.condition(lower, noise, torch.tensor([0.0, 1.0]), 8)
    assert torch.equal(found[0], cascade.raised(lower, 8)[0])
    assert torch.equal(found[1], cascade.raised(noise, 8)[1])


# ------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("side", [2, 8])
def test_every_weight_is_trained_at_every_resolution(side: int) -> None:
    """Else workers, or ZeRO's partitions, would wait for gradients that never come."""
    model = CascadeDiT(**ARGUMENTS)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)  # type: ignore[arg-type]
    module = TrainableCascade(model, VelocityMatching(PAIR, SemanticFirst(0.3)))
    x, _, y = batch(side)
    condition, level = no_condition(x) if side == 2 else (torch.randn_like(x), torch.rand(3))
    given = {"x1_BCHW": x, "y_B": y, "noise_BCHW": torch.randn_like(x), "u_B": torch.rand(3)}
    found = module(**given, condition_BCHW=condition, level_B=level)
    found["total"].backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == trained
    moved = bool(model.condition_embedder.proj.weight.grad.any())  # type: ignore[union-attr]
    assert moved == (side == 8), "zero weights of a condition learn where there is one"
    assert {f"by_time/{side}/texture", f"by_time/{side}/semantic"} <= found.keys()
    half = module(**given, condition_BCHW=condition, level_B=level, weight=0.5)
    torch.testing.assert_close(half["total"], 0.5 * found["total"])
    torch.testing.assert_close(half["velocity"], found["velocity"])


def test_guidance_wraps_a_conditioned_network() -> None:
    model, weak, (x, t, y) = small_cascade(), small_cascade(depth=1), batch(8)
    condition, level = torch.randn_like(x), torch.rand(3)
    main, guide = Conditioned(model, condition, level), Conditioned(weak, condition, level)
    null = torch.full_like(y, model.null_label)
    expected = main(x, t, null) + 2.0 * (main(x, t, y) - main(x, t, null))
    torch.testing.assert_close(ClassifierFree(2.0, model.null_label, groups=PAIR)(main)(x, t, y), expected)
    expected = guide(x, t, y) + 1.5 * (main(x, t, y) - guide(x, t, y))
    torch.testing.assert_close(AutoGuidance(guide, 1.5, groups=PAIR)(main)(x, t, y), expected)
