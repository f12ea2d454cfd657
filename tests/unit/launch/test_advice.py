"""Protects: a failing rank's error comes with three things to try that suit it."""

import pytest

from aquila.launch.advice import ADVICE, OTHER, USER, advice
from aquila.launch.launcher import done_text, failure_box


@pytest.mark.parametrize(
    ("status", "error", "name"),
    [
        (1, "torch.OutOfMemoryError: tried to allocate 2.00 GiB", "out of memory"),
        (-9, "step 3 | loss 2.1", "out of memory"),
        (1, "error: rank 3 stood still for 1800 s", "a rank stands still"),
        (1, "RuntimeError: [../gloo/transport/tcp/pair.cc:525] Connection closed by peer", "connection"),
        (1, "error: loss or gradient was not finite in 10 steps in a row", "not finite"),
        (1, "error: after step 9 the weights of rank(s) [2] differ from the others'", "device"),
        (1, "OSError: [Errno 28] No space left on device", "disk"),
        (1, "ModuleNotFoundError: No module named 'deepspeed'", "missing package"),
        (1, "KeyError: 'x'", OTHER.name),
        (2, "error: run.yaml: unknown key 'epoch'", USER.name),
    ],
)
def test_what_to_try_follows_from_what_happened(status: int, error: str, name: str) -> None:
    assert advice({"status": status, "error": error}).name == name


def test_every_piece_of_advice_has_three_steps() -> None:
    for entry in [*ADVICE, USER, OTHER]:
        assert len(entry.steps) == 3, entry.name


def test_the_box_has_error_advice_and_log() -> None:
    record = {"rank": 1, "node": "b", "status": 1, "error": "Traceback\nKeyError: 'x'", "log": "/runs/b.log"}
    box = failure_box(record, 80)
    assert "rank 1 on b failed first (exit status 1)" in box
    assert box.index("KeyError") < box.index("1. ") < box.index("3. ") < box.index("/runs/b.log")


def test_the_last_words_say_what_came_out_and_what_to_do_next() -> None:
    words = done_text({"step": 1, "loss": 9.5}, {"step": 12, "loss": 3.25}, "/runs/exp/2026010100")
    head, *then = words.splitlines()
    assert "12 steps" in head
    assert "loss 9.5000 to 3.2500" in head
    assert [line.split()[0] for line in then] == ["talk", "report", "continue"]
    assert done_text({}, {}, "/runs/exp/2026010100").startswith("done: /runs")
