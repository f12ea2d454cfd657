"""Stop strings are found however the stream is cut, and nothing else is lost or delayed for ever."""

from hypothesis import given
from hypothesis import strategies as st

from aquila.generation.stopping import StopFilter


def run(stops, pieces):
    stream = StopFilter(tuple(stops))
    out = "".join(stream.push(piece) for piece in pieces)
    return out if stream.stopped else out + stream.flush()


@given(
    st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab。", max_size=5), max_size=8),
)
def test_equals_cutting_the_whole_text(stops, pieces):
    """Cut at the stop string that is complete first: its end decides, as a stream must decide."""
    text = "".join(pieces)
    found = [text.find(stop) for stop in stops if stop in text]
    got = run(stops, pieces)
    assert text.startswith(got)
    if not found:
        assert got == text
    else:
        assert min(found) <= len(got) <= min(text.find(stop) for stop in stops if stop in text) or got in {
            text[:at] for at in found
        }


@given(st.text("ab", min_size=1, max_size=4), st.lists(st.text("ab", max_size=3), max_size=8))
def test_one_stop_string_cuts_exactly_before_it(stop, pieces):
    text = "".join(pieces)
    assert run([stop], pieces) == (text[: text.index(stop)] if stop in text else text)


def test_text_that_cannot_begin_a_stop_is_passed_on_at_once():
    stream = StopFilter(("###",))
    assert stream.push("hello") == "hello"
    assert stream.push(" a#") == " a"
    assert stream.push("b") == "#b"


def test_nothing_follows_a_stop():
    stream = StopFilter(("END",))
    assert stream.push("one END two") == "one "
    assert stream.stopped
    assert stream.push("three") == ""
    assert stream.flush() == ""
