"""Prompts from a pipe, a line each."""

import io

import pytest

from aquila.generation import terminal, tty


@pytest.fixture
def answers(monkeypatch):
    """The lines that reach the model, of bytes on standard input."""
    taken = []
    monkeypatch.setattr(terminal, "_take", lambda session, line, *rest, **more: taken.append(line))

    def run(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
        tty.use_utf8()
        return terminal.converse_by_lines(None, False), taken

    return run


def test_lines_that_are_no_utf8_are_refused_and_the_others_answered(answers, capsys):
    data = "太阳\n".encode() + "月亮\n".encode("gb18030") + "星星\n".encode()
    status, taken = answers(data)
    assert status == 2
    assert taken == ["太阳", "星星"]
    assert "standard input, line 2: not UTF-8 text; convert it" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_the_first_line(answers):
    assert answers("\ufeffone\r\ntwo \ufeff\n".encode()) == (0, ["one", "two \ufeff"])
