"""Products and convolutions have one precision, and it is said which."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from infra.device import computing, group_of_one, set_determinism, set_precision, uploaded

CPU = torch.device("cpu")


def reduced() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = reduced()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (("fp32",), False),
        (("tf32",), True),
        (("bf16",), True),
        (("fp16",), True),
        (("bf16", "tf32"), True),
        (("tf32", "fp32"), False),  # full float32 where one of those side by side wants it
    ],
)
def test_products_and_convolutions_have_one_precision(wanted: tuple[str, ...], expected: bool) -> None:
    set_precision(*wanted)
    assert reduced() == (expected, expected)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_stretch_leaves_things_as_they_were(precision: str) -> None:
    set_precision("tf32" if precision == "fp32" else "fp32")
    before, x = reduced(), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="within"), computing(precision, CPU):
        assert reduced() == ((precision != "fp32"),) * 2
        assert (x @ x).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        raise RuntimeError("within")
    assert reduced() == before and (x @ x).dtype == torch.float32


def test_on_a_cpu_tf32_is_fp32() -> None:
    x, kernel = torch.randn(64, 64), torch.randn(4, 4, 3, 3)
    results = []
    for precision in ("fp32", "tf32"):
        with computing(precision, CPU):
            results.append((x @ x, torch.conv2d(x.view(1, 4, 32, 32), kernel)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_what_is_uploaded_to_a_cpu_is_itself() -> None:
    x = torch.ones(2)
    assert uploaded(x, CPU) is x


def test_determinism_is_switched_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_determinism(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", ("gloo", None)), ("cuda", ("nccl", "cuda:3")), ("cuda:1", ("nccl", "cuda:1"))],
)
def test_a_group_names_its_device(
    device: str, expected: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL guesses it else, from the rank, and warns at each barrier."""
    asked: list[tuple[str, str | None]] = []

    def init(backend: str, device_id: torch.device | None = None, **_: object) -> None:
        asked.append((backend, None if device_id is None else str(device_id)))

    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    group_of_one(torch.device(device))
    assert asked == [expected]
