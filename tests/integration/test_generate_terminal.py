"""The conversation at a real pseudo-terminal: typing, Ctrl-C, Ctrl-D, pastes, very long lines."""

import os
import re
import sys
import time

import pexpect
import pytest

from tests.unit.generation.models import write_model_dir

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
PROMPT = "\x1b[?2004h"
"""What every new prompt begins with: it asks the terminal to mark pastes."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, root):
    """A context so long that an answer lasts until somebody stops it."""
    return write_model_dir(tmp_path_factory.mktemp("model"), root, max_seq_len=32768)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


def start(root, model_dir, state):
    """The program at a terminal, at its first prompt."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "XDG_STATE_HOME": str(state),
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }  # fmt: skip
    arguments = [str(root / "generate.py"), "--model-dir", str(model_dir), "--temperature", "0"]
    child = pexpect.spawn(
        sys.executable, arguments, cwd=str(root), env=environment, encoding="utf-8", codec_errors="strict",
        dimensions=(40, 200), timeout=60,
    )  # fmt: skip
    child.expect("Ctrl-D leaves")
    wait_for_prompt(child)
    return child


@pytest.fixture(scope="module")
def conversation(root, model_dir, state):
    child = start(root, model_dir, state)
    yield child
    child.sendcontrol("d")
    assert ends_well(child)


@pytest.fixture
def terminal(conversation):
    """One conversation that all tests go on with, its settings as at the start."""
    answer_to(conversation, "/set max_new_tokens 200")
    return conversation


def wait_for_prompt(child):
    child.expect_exact(PROMPT)
    # The prompt's editor needs a moment to put the terminal into raw mode.
    time.sleep(0.3)


def answer_to(child, line):
    """Types a line and gives back what the program wrote up to its next prompt."""
    child.send(line + "\r")
    wait_for_prompt(child)
    return ESCAPE.sub("", child.before)


def stats(child):
    shown = answer_to(child, "/stats")
    return {name: int(n) for n, name in re.findall(r"(\d+) (prompt tokens|new)", shown)}


def ends_well(child):
    child.expect(pexpect.EOF)
    child.wait()
    return child.exitstatus == 0


def test_answers_commands_and_ctrl_d(terminal):
    assert "max_new_tokens = 12" in answer_to(terminal, "/set max_new_tokens 12")
    answer_to(terminal, "one plus two 三加四🙂")
    first = stats(terminal)
    assert 0 < first["new"] <= 12
    assert "did you mean 'help'" in answer_to(terminal, "/halp")
    assert "Alt-Enter" in answer_to(terminal, "/help")
    assert "seed = 7" in answer_to(terminal, "/seed 7")


def test_ctrl_d_and_the_originals_word_leave(root, model_dir, state):
    for leaving in ("\x04", "false\r"):
        child = start(root, model_dir, state)
        child.send(leaving)
        assert ends_well(child)


def test_ctrl_d_typed_during_an_answer_leaves_after_it(root, model_dir, state):
    child = start(root, model_dir, state)
    child.send("go on\r")
    time.sleep(0.3)
    child.sendcontrol("d")
    assert ends_well(child)


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    answer_to(terminal, "/set max_new_tokens 30000")
    terminal.send("go on\r")
    time.sleep(2)
    terminal.sendintr()
    terminal.expect_exact("(stopped)")
    wait_for_prompt(terminal)
    assert 0 < stats(terminal)["new"] < 30000
    shown = answer_to(terminal, "/stats").split(" in ")[1]
    time.sleep(1)
    assert answer_to(terminal, "/stats").split(" in ")[1] == shown, (
        "the answer has ended; so have its figures"
    )
    assert "interrupted" in shown
    # Nor does it at the prompt, where it empties the line.
    terminal.send("half a line")
    time.sleep(0.3)
    terminal.sendintr()
    terminal.expect_exact("Ctrl-D")
    wait_for_prompt(terminal)
    answer_to(terminal, "/set max_new_tokens 3")
    answer_to(terminal, "another")
    assert stats(terminal)["new"] <= 3


def test_several_pasted_lines_are_one_prompt(terminal, model_dir):
    from aquila.tokenizer import load_tokenizer

    answer_to(terminal, "/set max_new_tokens 2")
    answer_to(terminal, "\x1b[200~one\ntwo\nthree\x1b[201~")
    expected = len(load_tokenizer(model_dir).encode("one\ntwo\nthree")) + 1
    assert stats(terminal)["prompt tokens"] == expected


def test_alt_enter_makes_a_new_line(terminal, model_dir):
    from aquila.tokenizer import load_tokenizer

    answer_to(terminal, "/set max_new_tokens 2")
    answer_to(terminal, "one\x1b\rtwo")
    assert stats(terminal)["prompt tokens"] == len(load_tokenizer(model_dir).encode("one\ntwo")) + 1


def test_a_line_of_ten_thousand_characters(terminal, model_dir):
    from aquila.tokenizer import load_tokenizer

    line = "one plus two is three. " * 435
    assert len(line) > 10_000
    answer_to(terminal, "/set max_new_tokens 2")
    terminal.send(line)
    terminal.send("\r")
    wait_for_prompt(terminal)
    assert stats(terminal)["prompt tokens"] == len(load_tokenizer(model_dir).encode(line)) + 1


def test_what_is_typed_during_an_answer_is_the_next_prompt(terminal):
    terminal.send("go on\r")
    time.sleep(0.2)
    terminal.send("/set top_k 17\r")
    terminal.expect_exact("top_k = 17")
    wait_for_prompt(terminal)


def test_tab_completes_commands_and_settings(terminal):
    assert "top_p = 0.5" in answer_to(terminal, "/set top_p\t 0.5")
    assert "max_new_tokens = 9" in answer_to(terminal, "/set max\t9")
    terminal.send("/he\t")
    terminal.expect_exact("/help")
    terminal.sendintr()
    wait_for_prompt(terminal)


def test_history_is_kept(terminal, state):
    answer_to(terminal, "/seed 11")
    assert "seed = 11" in answer_to(terminal, "\x1b[A")
    kept = state / "aquila" / "history"
    assert "/seed 11" in kept.read_text()
    assert kept.stat().st_mode & 0o077 == 0
