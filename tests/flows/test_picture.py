"""`latentforge sample`: a picture of chosen classes, or the sample's files, from what is trained already."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from configs import UserError
from flows.picture import draw, write_out
from tests.flows.conftest import Workplace


def test_a_picture_of_chosen_classes_in_one_line(finished: Workplace, tmp_path: Path) -> None:
    before = finished.manifests()
    target = tmp_path / "pictures" / "two.png"
    command = ("sample", "--recipe", "demo_tiny", "--root", finished.root, "--classes", "7,2", "--rows", "2")
    done = finished.flows(*command, "--seed", "1", "--output", str(target))
    assert str(target) in done.stdout and finished.rebuilt_since(before) == set()
    picture = np.asarray(Picture.open(target))
    assert picture.shape == (130, 130, 3), "two columns and rows of 64 pixels, 2 apart"

    again, other = tmp_path / "again.png", tmp_path / "other.png"
    draw("demo_tiny", [7, 2], 1, again, rows=2, root=finished.root)
    draw("demo_tiny", [7, 2], 2, other, rows=2, root=finished.root)
    assert np.abs(np.asarray(Picture.open(again)).astype(int) - picture).max() <= 1
    assert np.abs(np.asarray(Picture.open(other)).astype(int) - picture).max() > 1


def test_the_sample_as_files(finished: Workplace, tmp_path: Path) -> None:
    assert write_out("demo_tiny", tmp_path / "a.npz", tmp_path / "png", root=finished.root) == 40
    assert len(list((tmp_path / "png").iterdir())) == 40 and (tmp_path / "a.npz").is_file()


def test_what_is_not_trained_or_not_there_is_refused(finished: Workplace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not complete, so there is nothing to sample from"):
        draw("demo_tiny", [1], 0, tmp_path / "x.png", overrides=["train_dit.seed=99"], root=finished.root)
    with pytest.raises(UserError, match=r"sample\.labels names 10; data\.classes 10"):
        draw("demo_tiny", [10], 0, tmp_path / "x.png", root=finished.root)
