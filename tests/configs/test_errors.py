"""What an error quotes of others' making is told in a line that people read and no terminal obeys."""

from __future__ import annotations

import pickle

import pytest

from configs.errors import Unreachable, UserError


@pytest.mark.parametrize("kind", [UserError, Unreachable])
def test_what_a_terminal_would_obey_is_spelled_out(kind: type[UserError]) -> None:
    told = kind("a.csv: split 'x\x1b[2J\x00\u202e' of é 鳥.jpg;\nuse train")
    assert str(told) == r"a.csv: split 'x\x1b[2J\x00\u202e' of é 鳥.jpg;" + "\nuse train"
    again = pickle.loads(pickle.dumps(told))
    assert type(again) is kind and str(again) == str(told)


def test_of_a_line_without_end_the_beginning_and_the_way_out_are_left() -> None:
    lines = str(UserError(f"a.csv: first line has {'x' * 30_000}; columns path and label are needed\nb")).split("\n")
    assert len(lines[0]) < 4000 and lines[1] == "b"
    assert lines[0].startswith("a.csv: first line has xxx") and lines[0].endswith(
        "x; columns path and label are needed"
    )
