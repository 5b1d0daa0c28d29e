"""The check of GPUs that every GPU machine makes before it joins: counts, reasons, and what Ray was told."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError
from infra import gpus


def _machine(monkeypatch: pytest.MonkeyPatch, seen: int, driver: str | None, devices: int, cuda: str = "13.0") -> None:
    monkeypatch.setattr(gpus, "_names", lambda: ["H100"] * seen)
    monkeypatch.setattr(gpus, "_driver", lambda: driver)
    monkeypatch.setattr(gpus, "_devices", lambda: [f"/dev/nvidia{number}" for number in range(devices)])
    monkeypatch.setattr(gpus, "_cuda", lambda: cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES", raising=False)


@pytest.mark.parametrize(
    ("seen", "driver", "devices", "cuda", "words"),
    [
        (0, None, 0, "13.0", "0 of 8 GPUs visible: no NVIDIA driver is loaded; install driver 580.65.06"),
        (0, "570.133.20", 8, "13.0", "0 of 8 GPUs visible: driver 570.133.20 is older than 580.65.06"),
        (0, "570.133.20", 0, "12.8", "no device; start it with --gpus all"),
        (
            0,
            "580.65.06",
            0,
            "13.0",
            "0 of 8 GPUs visible: the driver is loaded, but this container was given no device",
        ),
        (7, "580.82.07", 8, "13.0", "7 of 8 GPUs visible: driver 580.82.07 runs /dev/nvidia0"),
    ],
)
def test_fewer_gpus_than_promised_are_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, seen: int, driver: str | None, devices: int, cuda: str, words: str
) -> None:
    _machine(monkeypatch, seen, driver, devices, cuda)
    with pytest.raises(UserError) as refused:
        gpus.require(8)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_hidden_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, 0, "580.82.07", 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="0 of 1 GPUs visible: CUDA_VISIBLE_DEVICES is ''"):
        gpus.require(1)


def test_the_command_takes_what_ray_was_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _machine(monkeypatch, 4, "580.82.07", 4)
    assert gpus.main([]) == 0, "a machine that promised none has all it promised"
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU":64,"GPU":8}')
    assert gpus.main([]) == 1
    assert capsys.readouterr().err.startswith("error: 4 of 8 GPUs visible: ")
    assert gpus.main(["4"]) == 0
    assert capsys.readouterr().out == "4 of 4 GPUs visible, H100\n"


def test_the_drivers_version_is_read_where_linux_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\nGCC version: gcc 13.3.0\n"
    )
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(gpus, "_VERSION", tmp_path / "version")
    assert gpus._driver() == "580.82.07"
    monkeypatch.setattr(gpus, "_VERSION", tmp_path / "none")
    assert gpus._driver() is None


def test_this_torchs_cuda_has_a_known_driver() -> None:
    """A newer CUDA in the lock has to bring its line into the table."""
    assert int(gpus._cuda().partition(".")[0]) in gpus._OLDEST_DRIVER
