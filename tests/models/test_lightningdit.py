"""Names, sizes and shapes of the backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.groups import SFD, ChannelGroups
from models.layers import RotaryTable
from models.lightningdit import LightningDiT, parameter_count
from models.sizes import SIZES
from tests.models.conftest import PAIR, small_batch, small_dit

GOLDEN = Path(__file__).parents[1] / "golden"
SFD_HEAD = {"groups": SFD, "qk_norm": True, "in_channels": 48, "align_depth": 2, "align_dim": 768}


def meta(size: str, **changes: Any) -> LightningDiT:
    arguments = {"input_size": 16, "in_channels": 32, "num_classes": 1000} | SIZES[size] | changes
    with torch.device("meta"):
        return LightningDiT(**arguments)


def published(table: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"official_{table}_tensors.json").read_text())


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S", 32.99), ("B", 130.56), ("L", 458.15), ("XL", 675.26), ("1p0B", 1029.40), ("1p6B", 1631.77)],
)
def test_parameter_counts_of_the_paper_page(size: str, millions: float) -> None:
    # papers.md counts the frozen position table.
    assert round(parameter_count(meta(size)) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("size", "with_head", "without"),
    [("B", 137.63, 130.29), ("L", 465.53, 457.66), ("XL", 682.77, 674.63), ("1p0B", 1037.19, 1028.27)],
)
def test_parameter_counts_of_sfd(size: str, with_head: float, without: float) -> None:
    headless = {name: value for name, value in SFD_HEAD.items() if not name.startswith("align")}
    assert round(parameter_count(meta(size, **SFD_HEAD)) / 1e6, 2) == with_head
    assert round(parameter_count(meta(size, **headless)) / 1e6, 2) == without


@pytest.mark.parametrize("table", ["lightningdit", "sfd"])
def test_parameter_counts_and_tensors_of_the_published_checkpoints(table: str) -> None:
    tensors_compared = 0
    for name, facts in published(table).items():
        size, patch = name.removeprefix("LightningDiT-").split("/")
        model = meta(size, patch_size=int(patch), **(SFD_HEAD if table == "sfd" else {}))
        # The published figures leave the frozen position table out.
        assert round(parameter_count(model, trainable=True) / 1e6, 2) == facts["params_M"], name
        if "tensors" in facts:
            found = {key: list(value.shape) for key, value in model.state_dict().items()}
            assert found == facts["tensors"]
            tensors_compared += 1
    assert tensors_compared == 1


def test_a_fresh_network_predicts_zero_velocity() -> None:
    model = LightningDiT(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    assert not model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 3])).any()


def test_one_clock_takes_plain_times() -> None:
    model = small_dit(groups=None, align_depth=None, align_dim=None)
    x, t, y = small_batch()
    assert torch.equal(model(x, t[:, 0], y), model(x, t[:, :1], y))


def test_each_group_has_its_own_clock() -> None:
    model = small_dit()
    x, t, y = small_batch()
    for group in range(2):
        moved = t.clone()
        moved[:, group] = (moved[:, group] + 0.5) % 1
        assert not torch.allclose(model(x, moved, y), model(x, t, y))


def test_alignment_is_asked_for_and_not_a_matter_of_mode() -> None:
    model = small_dit()
    batch = small_batch()
    for training in (True, False):
        model.train(training)
        velocity, projection = model.forward_with_alignment(*batch)
        assert torch.equal(model(*batch), velocity)
        assert projection.shape == (3, 12, 4, 4)


def test_training_mode_has_no_randomness() -> None:
    model = small_dit().train()
    batch = small_batch()
    assert torch.equal(model(*batch), model(*batch))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = small_dit()
    x, t, y = small_batch()
    torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input_size": 5, "patch_size": 2}, "input_size"),
        ({"num_heads": 3}, "hidden_size"),
        ({"num_heads": 16}, "multiple of 4"),
        ({"in_channels": 7}, "in_channels"),
        ({"align_depth": 3}, "align_depth"),
        ({"align_dim": None}, "align_dim"),
        ({"depth": 0, "align_depth": None, "align_dim": None}, "depth"),
        ({"groups": ChannelGroups(("semantic", "semblance"), (4, 2))}, "first three letters"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        small_dit(**changes)


def test_wrong_inputs_are_refused() -> None:
    model = small_dit(align_depth=None, align_dim=None)
    x, t, y = small_batch()
    with pytest.raises(ValueError, match="one time per image and channel group"):
        model(x, t[:, 0], y)
    with pytest.raises(ValueError, match="expected x of shape"):
        model(x[:, :4], t, y)
    with pytest.raises(ValueError, match="no alignment head"):
        model.forward_with_alignment(x, t, y)


def test_groups_split_and_spread() -> None:
    x = torch.arange(2 * 6).view(2, 6, 1, 1)
    texture, semantic = PAIR.split(x)
    assert texture.shape[1] == 4 and semantic[0].flatten().tolist() == [4, 5]
    assert PAIR.spread(torch.tensor([[1, 2]]))[0].flatten().tolist() == [1, 1, 1, 1, 2, 2]
    assert PAIR.slice_of("semantic") == slice(4, 6) and PAIR.channels == 6 and len(PAIR) == 2
    with pytest.raises(KeyError, match="texture, semantic"):
        PAIR.slice_of("colour")
    for names, sizes in ((("a", "a"), (1, 1)), (("a",), (1, 2)), (("a",), (0,)), ((), ())):
        with pytest.raises(ValueError, match="channel group"):
            ChannelGroups(names, sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rotary_positions_turn_pairs_as_the_formula_says(dtype: torch.dtype) -> None:
    """Also of queries that lie between keys and values in memory, and backwards."""
    torch.manual_seed(0)
    rope = RotaryTable(12, 3)
    packed = torch.randn(2, 9, 3 * 4 * 12).to(dtype).requires_grad_()
    x = packed.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)[1]
    found = rope(x)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    expected = (x * rope.freqs_cos + turned * rope.freqs_sin).to(dtype)
    gradient = torch.randn(expected.shape).to(dtype)
    backwards = tuple(torch.autograd.grad(each, packed, gradient)[0] for each in (found, expected))
    for one, two in ((found, expected), backwards):
        assert one.dtype == two.dtype == dtype
        torch.testing.assert_close(one, two)
