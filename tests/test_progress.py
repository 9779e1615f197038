"""Progress: a bar on a terminal, plain lines elsewhere."""

import io

import pytest

from rwkv_bone import terminal
from rwkv_bone.terminal import Progress


class Terminal(io.StringIO):
    encoding = "latin-1"

    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """The seconds of tqdm's clock, which the test moves."""
    seconds = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: seconds[0])
    return seconds


def show(now, stream, **more) -> str:
    """What is shown of 100 seconds in which the second half of 200 tokens is done."""
    with Progress(200, 100, "tokens", stream=stream, **more) as progress:
        for done in range(101, 201):
            now[0] += 1
            progress.update(done, f"loss {done}")
    return stream.getvalue()


def test_where_there_is_no_terminal_it_is_plain_lines_ten_seconds_apart(now):
    lines = show(now, io.StringIO(), label="read").splitlines()
    assert lines[0].split(", ") == ["read  55%", "loss 110", "1.00 tokens/s", "01:30 to go"]
    assert [line.split("%")[0] for line in lines] == [f"read {share:3}" for share in range(55, 101, 5)]
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("leave", [True, False])
def test_on_a_terminal_it_is_one_line_in_what_the_terminal_can_show(now, leave):
    shown = show(now, Terminal(), leave=leave)
    shown.encode("latin-1")
    assert shown.count("\n") == leave and " 75%|" in shown and "loss 150" in shown
    assert leave == (shown.split("\r")[-1].startswith("100%|"))
    assert leave or not shown.split("\r")[-2].strip()


def test_what_is_done_at_once_prints_no_line_elsewhere(now):
    stream = io.StringIO()
    with Progress(3, unit="tokens", stream=stream) as progress:
        now[0] += terminal.LINE_SECONDS / 2
        progress.update(3)
    assert stream.getvalue() == ""
