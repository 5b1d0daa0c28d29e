"""Lines of stages: text for people, JSON for programs, and the way back."""

from __future__ import annotations

import json
import logging

import pytest

from infra import logs
from infra.logs import Line
from infra.progress import Bar


@pytest.mark.parametrize("prefix", ["", "(RayTrainWorker pid=123, ip=10.0.0.1) ", "\x1b[36m(Map pid=7)\x1b[0m "])
def test_lines_come_back_as_they_were_said(
    prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    logs.say("encode: 5 of 10", "warning", stage="encode", images=5, total=10)
    said = capsys.readouterr().out
    assert set(json.loads(said)) == {"time", "level", "message", "stage", "images", "total"}
    found = logs.read(f"{prefix}{said.rstrip()} [repeated 3x across cluster]\n")
    assert found == Line("encode: 5 of 10", "warning", {"stage": "encode", "images": 5, "total": 10})


@pytest.mark.parametrize("text", ["anything else", '{"time": half an object', '{"time": "x", "other": 1}'])
def test_what_was_not_said_by_us_is_its_own_message(text: str) -> None:
    assert logs.read(text + "\n") == Line(text)


def test_people_get_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(logs.FORMAT, raising=False)
    logs.say("encode: 5 of 10", images=5)
    assert capsys.readouterr().out == "encode: 5 of 10\n"


def test_libraries_speak_json_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    logs.set_up()
    try:
        raise ValueError("of ours")
    except ValueError:
        logging.getLogger("library").exception("went wrong")
    found = json.loads(capsys.readouterr().err)
    assert (found["level"], found["message"], found["logger"]) == ("error", "went wrong", "library")
    assert "ValueError: of ours" in found["traceback"]


def test_a_bar_says_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(logs.FORMAT, "json")
    monkeypatch.setattr("infra.progress._SECONDS_BETWEEN_LINES", 0.0)
    with Bar("encode", 10) as bar:
        bar.skip(4)
        bar.advance(3)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["images"] for line in lines] == [4, 7], "its end says again what was just said in no line"
    assert {line["stage"] for line in lines} == {"encode"} and {line["total"] for line in lines} == {10}
