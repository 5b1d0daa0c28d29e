"""What a person names to be written: where it cannot be, one line says so."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from configs import UserError
from flows.init import init
from flows.look import look, section_of
from flows.options import writing
from tests.helpers.odd_sources import tree


def _full(path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_half_of_a_new_file(tmp_path: Path) -> None:
    new = tmp_path / "of its own" / "new.png"
    told = r"cannot write .*new\.png \(No space left.*\): check the folder"
    with pytest.raises(UserError, match=told), writing(new):
        _full(new)
    assert new.parent.is_dir() and not new.exists()


def test_a_file_that_was_there_is_not_deleted_for_what_could_not_be_written(tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match="Permission denied"), writing(mine):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert mine.read_bytes() == b"mine"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .* \(Is a directory\)"), writing(tmp_path):
        tmp_path.write_bytes(b"")


def test_a_librarys_own_error_is_told_and_a_mistake_stays_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="failed writing file"), writing(tmp_path / "a", RuntimeError):
        raise RuntimeError("PytorchStreamWriter failed writing file")
    with pytest.raises(RuntimeError, match="a defect"), writing(tmp_path / "a"):
        raise RuntimeError("a defect")


def test_look_and_init_say_where_they_cannot_write(tmp_path: Path) -> None:
    tree(tmp_path / "photos", {"cats": 12, "dogs": 12})
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    with pytest.raises(UserError, match=r"cannot write .*below"):
        init(str(tmp_path / "photos"), place)
    data = section_of(str(tmp_path / "photos"), None, None, ())
    with pytest.raises(UserError, match=r"cannot write .*below"):
        look(data, 4, 0, place)
