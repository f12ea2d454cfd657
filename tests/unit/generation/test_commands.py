"""What a line of a conversation means, and what /commands change."""

import pytest

from aquila.core.errors import UserError
from aquila.generation.chat import Session
from aquila.generation.commands import COMMANDS, HELP, is_command, leaves, run_command_line
from aquila.generation.load import load
from aquila.generation.sampling import Sampling
from tests.unit.generation.models import write_model_dir


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, root):
    return load(write_model_dir(tmp_path_factory.mktemp("model"), root))


@pytest.fixture
def session(loaded):
    return Session(loaded, Sampling(max_new_tokens=8, seed=3))


def test_words_that_leave():
    assert all(map(leaves, ("exit", "quit", "false", " Exit ", "/quit")))
    assert not any(map(leaves, ("exit now", "", "falsehood")))


def test_a_path_or_a_lone_slash_is_a_prompt():
    assert is_command("/help")
    assert not any(map(is_command, ("/", "/ x", "//", "a /help", "/1")))


def test_every_command_is_in_the_help():
    assert all(f"/{name}" in HELP for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set top-k 5", "top_k", 5),
        ("/SET Top_K 5", "top_k", 5),
        ("/set --max-new-tokens 9", "max_new_tokens", 9),
        ("/set repetition_penalty 1.2", "repetition_penalty", 1.2),
        ('/set stop "end of" "\\n"', "stop", ("end of", "\n")),
        ("/set stop", "stop", ()),
        ("/seed 42", "seed", 42),
        ("/seed", "seed", None),
    ],
)
def test_settings_change(session, line, name, value):
    run_command_line(session, line)
    assert getattr(session.sampling, name) == value


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hepl", "did you mean 'help'"),
        ("/set temprature 1", "did you mean 'temperature'"),
        ("/set temperature hot", "must be a number"),
        ("/set temperature -1", "0 \\(greedy\\) or more"),
        ("/set top_k 1.5", "whole number"),
        ("/set top_k", "one value"),
        ('/set stop "', "quotation"),
    ],
)
def test_mistakes_are_explained_and_change_nothing(session, line, message):
    before = session.sampling
    with pytest.raises(UserError, match=message):
        run_command_line(session, line)
    assert session.sampling == before


def test_stats_tell_of_the_last_answer(session):
    assert "no answer yet" in run_command_line(session, "/stats")
    for _ in session.answer("one two"):
        pass
    shown = run_command_line(session, "/stats")
    assert "8 new" in shown or session.last.new_tokens < 8
    assert "seed 3" in shown
    assert "tokens/s" in shown


def test_interrupted_answer_does_not_spoil_the_next(session):
    full = "".join(piece for piece, _ in session.answer("one two"))
    stream = session.answer("one two")
    next(stream)
    next(stream)
    stream.close()
    assert "".join(piece for piece, _ in session.answer("one two")) == full


def test_samples_differ_and_come_in_order(session):
    session.set("temperature", 1.5)
    answers = list(session.answers(["one", "a much longer prompt than the other"], samples=3))
    assert [a.prompt for a in answers] == ["one"] * 3 + ["a much longer prompt than the other"] * 3
    assert [a.sequence.seed for a in answers] == [3, 4, 5] * 2
    assert len({a.text for a in answers[:3]}) == 3


def test_stop_string_cuts_the_text(session):
    whole = "".join(piece for piece, _ in session.answer("one two"))
    stop = whole[3:5]
    session.set("stop", (stop,))
    text = "".join(piece for piece, _ in session.answer("one two"))
    assert text == whole[: whole.index(stop)]
    assert session.last.finish_reason == "stop"
