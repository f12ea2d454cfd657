"""The run's own records: valid JSON with every promised key, continued without repeats after a resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from aquila.training.deepspeed.engine import NO_FLAGS, StepResult
from aquila.training.metrics import RunLog, StepTimer, forget_after, read_metrics
from aquila.training.plot import smooth
from aquila.training.state import TrainState

KEYS = [
    "step", "loss", "learning_rate", "grad_norm", "loss_scale", "tokens_per_second",
    "tokens_per_second_per_device", "mfu", "step_seconds", "memory_gib", "consumed_samples",
    "consumed_tokens", "epoch", "total_steps", "time",
]  # fmt: skip


RESULT = StepResult(
    loss=2.5, grad_norm=1.0, loss_scale=1.0, skipped=False, spike=False, rank_losses=[2.5, 2.5],
    forward_seconds=[0.1, 0.1], bad_gradient_ranks=[], flags=NO_FLAGS,
)  # fmt: skip


class FixedTimer(StepTimer):
    """Half a second a step."""

    def take(self) -> tuple[float, dict]:
        return 0.5, super().take()[1]


def open_log(folder: Path, resumed_step: int = 0) -> RunLog:
    return RunLog(
        folder, total_steps=10, tokens_per_step=1000, samples_per_epoch=10, world_size=2, flops_per_token=2e6,
        peak_flops=1e9, memory_gib=lambda: 1.0, resumed_step=resumed_step,
    )  # fmt: skip


def write(log: RunLog, step: int, **changes: float) -> None:
    log.step(TrainState(step, step * 4, step * 1000), replace(RESULT, **changes), 1e-3, FixedTimer())


def test_a_record_has_the_promised_keys_and_right_rates(tmp_path: Path, capsys) -> None:
    log = open_log(tmp_path)
    write(log, 3)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert list(record) == KEYS
    assert record["tokens_per_second"] == 2000
    assert record["tokens_per_second_per_device"] == 1000
    assert record["epoch"] == 1  # 12 samples of epochs of 10
    assert record["mfu"] == 2.0  # 1000 tokens/s x 2e6 FLOPs / 1e9 FLOP/s
    assert "step  3/10 | loss 2.5000" in capsys.readouterr().out


def test_nan_is_written_as_valid_json(tmp_path: Path) -> None:
    write(open_log(tmp_path), 1, loss=float("nan"))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0)["loss"] is None


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(1, 6):
        write(log, step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    again = open_log(tmp_path, resumed_step=3)
    write(again, 4, loss=1.0)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] == 1.0


ODD = [
    b"[]",
    b"7",
    b"null",
    b'"text"',
    b"{}",
    b'{"step": "3"}',
    b"\xff\xfe",
    b"[" * 100000,
    b"1" * 5000,
    b"\0" * 50,
]


def test_odd_lines_bar_no_resume(tmp_path: Path, capsys) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"step": %d}\n%s\n' % (i, line) for i, line in enumerate(ODD)))
    forget_after(path, 4)
    assert path.read_text() == "".join(f'{{"step": {i}}}\n' for i in range(5))
    assert f"{len(ODD)} line(s) are no records" in capsys.readouterr().out


def test_forget_after_leaves_a_whole_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    forget_after(path, 1)
    assert path.stat().st_ino == before


def test_the_first_step_does_not_count_where_others_do() -> None:
    timer = StepTimer()
    for _ in range(3):
        timer.start()
        timer.stop([0.1, 0.1])
    timer._first = 1000.0
    assert timer.take()[0] < 1
    assert timer.take()[0] == 1000.0  # nothing since: only the first is known


def test_the_slowest_rank_and_other_times_are_told_once() -> None:
    timer = StepTimer()
    for forward in ([0.1, 0.1, 9.0], [0.1, 0.3, 0.2], [0.1, 0.3, 0.2]):
        timer.start()
        timer.stop(forward)
    timer.other("save_seconds", 2.0)
    timer.other("save_seconds", 1.0)
    rest = timer.take()[1]
    assert rest == {"save_seconds": 3.0, "slowest_rank": 1, "slowest_rank_excess": 0.5}
    assert timer.take()[1] == {}


def test_smoothing_keeps_the_level_and_passes_over_gaps() -> None:
    assert smooth([2.0] * 200)[-1] == 2.0
    assert smooth([2.0, float("nan"), 2.0])[-1] == 2.0
    falling = [10 - step / 10 for step in range(101)]
    assert smooth(falling) == pytest.approx(falling)  # no lag behind a steady change
    noisy = [value + (-1) ** step for step, value in enumerate(falling)]
    assert max(abs(a - b) for a, b in zip(smooth(noisy)[5:-5], falling[5:-5], strict=True)) < 0.35
