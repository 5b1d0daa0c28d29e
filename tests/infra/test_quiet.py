"""The console shows what stages say, once and without prefixes; libraries speak to a file."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra import stopping
from infra.logs import MARK, MARKED, say
from infra.quiet import Console, LastLine, Log, console, shown

OURS = "   train_dit ━━━━━━··············  30 %  9,600 images  410/s  wait 1 %  900 MiB  total 1.2"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"\x1b[36m(RayTrainWorker pid=812)\x1b[0m {OURS}", OURS),
        (f"(RayTrainWorker pid=812, ip=10.0.0.3) {OURS}", OURS),
        ("(MapWorker(Map(_Worker)) pid=7) tokenizer compiled in 12 s", "tokenizer compiled in 12 s"),
        ("21:09:56.123 | INFO    | Flow run 'demo' - made shard: 700 rows, 3 s", "same"),
        ("(a note of ours in brackets)", "same"),
        ("\x1b[36m(TrainController pid=9)\x1b[0m [State Transition] INITIALIZING -> SCHEDULING.", None),
        ("(raylet) [2026-11-26 10:00:00,123 E 12 34] (raylet) node_manager.cc:3041: 1 Workers", None),
        ("(raylet, ip=10.0.0.3) Task failed. There are infinite retries remaining", None),
        ("(MapWorker(Map(_Worker)) pid=7) [2026-11-26 10:00:00,123 C 7 7] core_worker.cc:2100: exits", None),
        ("(RayTrainWorker pid=1) 2026-11-26 10:00:00,123\tINFO config.py:1 -- set up", None),
        ('(RayTrainWorker pid=1)   File "x.py", line 3, in f', None),
        ("(RayTrainWorker pid=1) Traceback (most recent call last):", None),
        ("(_train_remotely pid=1) /lib/x.py:3: UserWarning: deprecated", None),
    ],
)
def test_whose_line_it_is(line: str, expected: str | None) -> None:
    assert shown(line) == (line if expected == "same" else expected)


def test_where_workers_mark_their_lines_no_other_is_shown() -> None:
    assert shown(f"\x1b[36m(RayTrainWorker pid=8)\x1b[0m {OURS}{MARK}", marked=True) == OURS
    assert shown(f"{OURS}{MARK}") == OURS, "of this process"
    noise = "(RayTrainWorker pid=8) Setting up process group for: env:// [rank=0, world_size=2]"
    assert shown(noise, marked=True) is None
    assert shown("21:09 | INFO | made shard", marked=True) == "21:09 | INFO | made shard"


def test_what_a_stage_says_is_marked_for_its_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with console():
        assert os.environ[MARKED]
        say("made of three parts")
        say("to the other stream", file=sys.stderr)
    assert MARKED not in os.environ
    assert capsys.readouterr() == ("made of three parts\n", "to the other stream\n")


def test_lines_of_libraries_leave_nothing_on_the_console_and_lie_in_a_file(home: Path) -> None:
    stream, log = io.StringIO(), Log()
    out = Console(stream, log)  # type: ignore[arg-type]
    print("before", file=out)  # type: ignore[call-overload]
    print("\x1b[36m(TrainController pid=9)\x1b[0m [State Transition] A -> B", file=out)  # type: ignore[call-overload]
    print(f"(RayTrainWorker pid=1) {OURS}", file=out)  # type: ignore[call-overload]
    out.write("\r50 %")
    print("\nafter", file=out)  # type: ignore[call-overload]
    assert stream.getvalue() == f"before\n{OURS}\n\r50 %\nafter\n"
    assert log.path is not None and log.path.parent == home / "logs"
    assert log.path.read_text() == "(TrainController pid=9) [State Transition] A -> B\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_no_word_of_a_command_that_was_asked_to_stop(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, log = io.StringIO(), Log()
    out = Console(stream, log)  # type: ignore[arg-type]
    print(f"(RayTrainWorker pid=1) {OURS}", file=out)  # type: ignore[call-overload]
    monkeypatch.setattr(stopping, "asked", lambda: 2)
    late = f"(RayTrainWorker pid=1) {OURS.replace('30 %', '60 %')}"
    print(late, file=out)  # type: ignore[call-overload]
    print("stopped at 60 images", file=out)  # type: ignore[call-overload]
    assert stream.getvalue() == f"{OURS}\nstopped at 60 images\n"
    assert log.path is not None and log.path.read_text() == f"{late}\n"


def test_on_a_terminal_a_trainings_bar_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    terminal, log, last = _Terminal(), Log(), LastLine()
    out, errors = (Console(terminal, log, last=last) for _ in range(2))
    print(f"(RayTrainWorker pid=1) {OURS}", file=errors)  # type: ignore[call-overload]
    print("(raylet) a worker died", file=errors)  # type: ignore[call-overload]
    print(f"(RayTrainWorker pid=1) {OURS.replace('30 %', '60 %')}", file=errors)  # type: ignore[call-overload]
    assert terminal.getvalue() == f"\r\x1b[2K{OURS[:29]}" * 2
    print("made train_dit", file=out)  # type: ignore[call-overload]
    print(f"(RayTrainWorker pid=1) {OURS}", file=errors)  # type: ignore[call-overload]
    other = OURS.replace("train_dit", "train_vae")
    print(f"(RayTrainWorker pid=1) {other}", file=errors)  # type: ignore[call-overload]
    last.end()
    lines = terminal.getvalue().split("\n")
    assert lines[1:] == ["made train_dit", f"\r\x1b[2K{OURS[:29]}", f"\r\x1b[2K{other[:29]}", ""]


def test_the_path_is_named_once_and_only_where_something_is_in_it(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with console():
        print("made shard")
    assert capsys.readouterr() == ("made shard\n", "")
    with pytest.raises(RuntimeError), console() as log:
        print("(raylet) a worker died", file=sys.stderr)
        raise RuntimeError
    assert capsys.readouterr() == ("", f"what libraries said beside this is in {log.path}\n")


def test_the_log_of_a_command_that_still_works_is_not_deleted_by_later_ones(home: Path) -> None:
    long = Log()
    long.write("of a training that takes days")
    ended = [home / "logs" / f"9{day:04d}.log" for day in range(30)]
    for each in ended:
        each.write_text("of a command that has ended")
    Log().open()
    assert long.path is not None and long.path.read_text() == "of a training that takes days\n"
    assert [each.exists() for each in ended] == [day >= 10 for day in range(30)]
    shutil.rmtree(home / "logs")
    long.close()
    assert long.path is None, "nothing is left to point to"


def test_the_path_is_no_second_line_of_a_command_that_is_stopped(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping._State, "number", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), console() as log:
        print("(raylet) a worker died", file=sys.stderr)
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "") and log.path is not None and log.path.exists()


_LOUD = """
import logging, os, subprocess, sys
class Moment(logging.Handler):
    stream = property(lambda self: sys.stderr)
    emit = lambda self, record: print("of the moment", file=self.stream)
for handler in (logging.StreamHandler(), Moment()):
    logging.root.addHandler(handler)
from infra.quiet import console
with console():
    os.write(2, b"[2026-11-26 10:00:00,123 E 7 7] core_worker.cc:2465: Actor\\n")
    subprocess.run(["sh", "-c", "echo a daemon >&2"])
    print("one bar", file=sys.stderr)
    logging.warning("made shard")
    os.write(sys.stderr.fileno(), b"stopped\\n")
os.write(2, b"after\\n")
logging.warning("later")
"""


def test_what_is_written_past_python_is_not_on_the_console(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LOUD], capture_output=True, text=True, check=True)
    (log,) = (home / "logs").iterdir()
    told, warned = f"what libraries said beside this is in {log}", lambda text: (text, "of the moment")
    assert done.stderr.splitlines() == ["one bar", *warned("made shard"), "stopped", told, "after", *warned("later")]
    assert log.read_text().splitlines()[1:] == ["a daemon"] and "core_worker.cc" in log.read_text()
