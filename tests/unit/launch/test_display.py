"""Protects: what the terminal shows of a run fits it and leaves nothing behind."""

import io

import pytest

from aquila.launch import display
from aquila.launch.display import Display, boxed, progress_line, red

METRIC = {
    "step": 12, "total_steps": 500, "loss": 5.4321, "learning_rate": 2e-4, "tokens_per_second": 1234567.0,
    "mfu": 0.5, "memory_gib": 61.25, "step_seconds": 90.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminal


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_progress_line_fits_every_terminal(width: int) -> None:
    line = progress_line(METRIC, width)
    assert len(line) < width
    assert line.startswith("step 12/500")


def test_the_progress_line_tells_the_time_that_is_left() -> None:
    assert "12 h 12 min left" in progress_line(METRIC, 80)
    assert "0 s left" in progress_line({**METRIC, "step": 500}, 80)
    assert "[############]" in progress_line({**METRIC, "step": 500}, 80)


def test_nothing_of_the_live_line_is_left_and_words_come_last(terminal: Terminal, monkeypatch) -> None:
    monkeypatch.setattr(display.sys, "stdout", terminal)
    with Display(500) as shown:
        shown.metric(METRIC)
        shown.metric({**METRIC, "step": 500})
        shown.text("done: all of it")
    screen = [line.rsplit("\r\x1b[K", 1)[-1] for line in terminal.getvalue().split("\n")]
    assert screen == ["done: all of it", ""]


def test_elsewhere_plain_lines_and_the_last_step_before_the_last_words(monkeypatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(display.sys, "stdout", file)
    with Display() as shown:
        for step in range(1, 13):
            shown.metric({"step": step, "total_steps": 12, "loss": 1.0})
        shown.text("done")
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert lines[-2:] == ["step 12/12  loss 1.0000", "done"]


def test_colours_only_on_a_terminal_and_never_with_no_color(terminal: Terminal, monkeypatch) -> None:
    assert red("error", terminal) == "\x1b[31merror\x1b[0m"
    assert red("error", io.StringIO()) == "error"
    monkeypatch.setenv("NO_COLOR", "1")
    assert red("error", terminal) == "error"


def test_a_box_wraps_within_a_terminal_and_cuts_nothing_in_a_file() -> None:
    text = "RuntimeError: " + "long " * 40
    box = boxed("rank 1 failed", [text, "", "short"], 80).splitlines()
    assert max(map(len, box)) <= 80
    assert all(line[0] in "|+" for line in box)
    assert text.rstrip() in boxed("rank 1 failed", [text], None)
