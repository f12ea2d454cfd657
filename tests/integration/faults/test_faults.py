"""The fault suite at a small size; `bash scripts/soak.sh` runs it at length."""

import itertools
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.integration.faults import scenarios
from tests.integration.training_runs import (
    children,
    exact,
    finish,
    make_project,
    metrics,
    start,
    train,
    wait_for,
)

SHORT = ("train_iters=6", "eval_interval=0", "gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("faults"))


def test_kill_9_of_a_rank(project: Path) -> None:
    outcome = scenarios.killed_at_random(project, "killed", random.Random(1))
    assert outcome.survived, outcome.note
    assert outcome.steps_lost <= 8  # the newest checkpoint may still have been on its way


def test_kill_9_while_saving(project: Path) -> None:
    outcome = scenarios.killed_while_saving(project, "killed-saving", random.Random(2))
    assert outcome.survived, outcome.note


def test_sigterm_loses_nothing(project: Path) -> None:
    outcome = scenarios.terminated(project, "terminated", random.Random(3))
    assert outcome.survived, outcome


def test_sigterm_while_a_checkpoint_is_on_its_way_loses_neither(project: Path) -> None:
    outcome = scenarios.terminated(project, "terminated-saving", random.Random(5), while_saving=True)
    assert outcome.survived, outcome
    folder = project / "checkpoints_out" / "terminated-saving" / "0" / "checkpoints"
    assert (folder / "step-00000004").is_dir()
    assert not list(folder.glob(".*"))


def test_a_second_ctrl_c_ends_at_once(project: Path) -> None:
    """The first waits for the step, here for ever; the second does not."""
    process = start(project, "interrupted", *SHORT, ranks=1, fault="asleep:3:0")
    try:
        wait_for(lambda: scenarios.last_step(project, "interrupted") >= 2, process)
        (rank,) = children(process.pid)
        os.kill(rank, signal.SIGINT)
        time.sleep(1)
        assert children(process.pid) == [rank]
        os.kill(rank, signal.SIGINT)
        output = finish(process, 30)
    finally:
        process.kill()
    assert "Signal 2 (SIGINT) received" in output
    assert "saved" not in output


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(project: Path) -> None:
    outcome = scenarios.damaged(project, "damaged", random.Random(4), scenarios.flip_bit, "flipped bit")
    assert outcome.survived, outcome.note
    assert outcome.steps_lost == 2  # from the checkpoint of step 14 back to that of step 12


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(project: Path) -> None:
    outcome = scenarios.full_disk(project, "full")
    assert outcome.survived, outcome.note


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_read_only_folder_is_one_clear_message(project: Path) -> None:
    disk = scenarios.SmallDisk(project / "checkpoints_out" / "readonly", 1 << 20)
    try:
        disk.read_only()
        _, output = train(project, "readonly", *SHORT, ranks=1)
    finally:
        disk.read_only(False)
        disk.close()
    assert "cannot be written" in output
    assert "exitcode  : 2" in output


def test_a_nan_is_skipped_by_all_ranks_and_told_with_its_documents(project: Path) -> None:
    status, output = train(project, "nan", *SHORT, fault="nan:3:1")
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if "is skipped on all ranks" in line]
    assert line.startswith("warning: step 3")
    assert "loss not finite on ranks [1]" in line
    assert "samples 8 to 11" in line
    assert "documents" in line
    records = metrics(project, "nan")
    assert [record["step"] for record in records if record.get("skipped")] == [3]
    assert records[-1]["loss"] < records[0]["loss"] + 1


def test_a_bad_gradient_is_told_with_its_rank_where_every_loss_was_good(project: Path) -> None:
    status, output = train(project, "grad", *SHORT, fault="grad:3:1")
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if "is skipped on all ranks" in line]
    assert line.startswith("warning: step 3")
    assert "gradient not finite on ranks [1], every loss was" in line
    assert "documents" in line


def test_the_fp16_loss_scale_falls_rises_and_survives_a_stop(project: Path) -> None:
    """From `bmt_loss_scale` down until nothing overflows, up again after `loss_scale_window` good steps."""
    options = ("precision=fp16", "bmt_loss_scale=8388608", "loss_scale_window=4", "train_iters=16")
    options += SHORT[1:]
    status, output = train(project, "fp16", *options, fault="none:0:0")
    assert status == 0, output
    records = metrics(project, "fp16")
    scales = [record["loss_scale"] for record in records]
    skipped = [record["step"] for record in records if record.get("skipped")]
    assert scales[0] == 8388608
    first_good = next(k for k, record in enumerate(records) if not record.get("skipped"))
    fall = scales[: first_good + 1]
    assert all(later in (earlier, earlier / 2) for earlier, later in itertools.pairwise(fall))
    assert scales[first_good] < 8388608 / 8
    assert any(later == 2 * earlier for earlier, later in itertools.pairwise(scales))
    assert output.count("overflowed fp16 at loss scale") == len(skipped)
    assert "step 1 overflowed fp16 at loss scale 8.38861e+06 and is skipped" in output
    assert all(record["grad_norm"] for record in records if not record.get("skipped"))

    _, output = train(project, "fp16-parts", *options, f"exit_interval={first_good + 3}", fault="none:0:0")
    assert "exitcode  : 75" in output
    status, output = train(project, "fp16-parts", *options, fault="none:0:0")
    assert status == 0, output
    parts = metrics(project, "fp16-parts")
    assert exact(parts) == exact(records)
    assert [record["loss_scale"] for record in parts] == scales


def test_at_the_lowest_loss_scale_bad_gradients_are_counted_and_end_the_run(project: Path) -> None:
    options = ("precision=fp16", "bmt_loss_scale=4", "train_iters=30", "max_bad_steps=3")
    status, output = train(project, "lowest", *options, *SHORT[1:], fault="grad-always:2:1")
    assert status == 1
    assert "step 2 overflowed fp16 at loss scale 4 and is skipped; now it is 4" in output  # hysteresis
    assert "step 4 overflowed fp16 at loss scale 2 and is skipped; now it is 1" in output
    assert "gradient not finite on ranks [1], every loss was" in output
    assert "not finite in 3 steps in a row, up to step 7" in output


def test_a_spike_is_left_out(project: Path) -> None:
    options = (*SHORT[1:], "train_iters=104", "log_interval=1", "skip_spikes=3")
    status, output = train(project, "spike", *options, fault="spike:103:1")
    assert status == 0, output
    (line,) = [line for line in output.splitlines() if "is skipped on all ranks" in line]
    assert line.startswith("warning: step 103")
    assert "is a spike over its mean" in line
    records = metrics(project, "spike")
    assert records[-1]["loss"] < 2 * records[-3]["loss"]


def test_nan_for_ever_gives_up_with_advice(project: Path) -> None:
    options = ("max_bad_steps=3", "save_interval=3")
    status, output = train(project, "nan-always", *SHORT, *options, fault="nan-always:2:0")
    assert status == 1
    assert "not finite in 3 steps in a row, up to step 4" in output
    folder = (
        project / "checkpoints_out" / "nan-always" / "0" / "checkpoints"
    )  # the save in flight was finished
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000003"]


def test_a_rank_asleep_ends_the_run_and_is_named(project: Path) -> None:
    status, output = train(project, "asleep", *SHORT, "hang_timeout=6", fault="asleep:3:1")
    assert status == 1
    verdicts = [line for line in output.splitlines() if line.startswith("error: no step was finished")]
    assert verdicts
    assert all("Stuck: rank 1 at " in line and "rank 0 at" not in line for line in verdicts)
    assert "Thread" in output  # faulthandler's stacks
    assert "fault_rank.py" in output


@pytest.mark.slow
def test_a_rank_that_does_not_even_answer_is_named(project: Path) -> None:
    process = start(project, "frozen", *SHORT[1:], "train_iters=100000", "hang_timeout=6")
    try:
        wait_for(lambda: scenarios.last_step(project, "frozen") >= 2, process)
        frozen = children(process.pid)[1]
        os.kill(frozen, signal.SIGSTOP)
        output = finish(process, 90)
    finally:
        process.kill()
    assert "rank 1, which does not even answer" in output


def test_a_diverged_replica_is_found(project: Path) -> None:
    status, output = train(project, "flip", *SHORT, "replica_check_interval=1", fault="flip:1:1", ranks=3)
    assert status == 1
    assert "the weights of rank(s) [1] differ" in output


@pytest.mark.slow
def test_a_clock_set_back_changes_nothing(project: Path) -> None:
    status, output = train(project, "clock", *SHORT, fault="clock:3:0")
    assert status == 0, output
    assert all(0 < record["step_seconds"] < 60 for record in metrics(project, "clock"))


@pytest.mark.slow
def test_a_disk_slower_than_hang_timeout_ends_nothing(project: Path) -> None:
    status, output = train(
        project, "slow-disk", *SHORT, "hang_timeout=6", "save_interval=2", fault="slow-disk:2:0"
    )
    assert status == 0, output
    assert "error" not in output
    assert output.count("a slow fsync") > 4  # longer than hang_timeout, two seconds each


@pytest.mark.slow
def test_a_frozen_machine_and_torn_side_files(project: Path) -> None:
    dice = random.Random(1)
    for scenario in (scenarios.frozen, scenarios.torn_side_files):
        outcome = scenario(project, scenario.__name__, dice)
        assert outcome.survived, outcome


def test_two_runs_in_one_folder_and_a_save_on_request(project: Path) -> None:
    process = start(project, "twice", *SHORT[1:], "train_iters=100000", ranks=1)
    try:
        wait_for(lambda: scenarios.last_step(project, "twice") >= 1, process)
        _, output = train(project, "twice", *SHORT, ranks=1)
        assert "is in use by process" in output
        assert "exitcode  : 2" in output
        assert process.poll() is None
        (rank,) = children(process.pid)
        os.kill(rank, signal.SIGUSR1)  # saves and goes on
        folder = project / "checkpoints_out" / "twice" / "0" / "checkpoints"
        wait_for(lambda: list(folder.glob("step-*")), process)
        reached = scenarios.last_step(project, "twice")
        wait_for(lambda: scenarios.last_step(project, "twice") > reached, process)
    finally:
        for rank in children(process.pid):
            os.kill(rank, signal.SIGINT)
        output = finish(process, 60)
    assert "exitcode  : 75" in output
    assert not list(folder.glob(".*partial"))


@pytest.mark.parametrize(
    ("stage", "batch_sizes"),
    [
        (2, {1: 12, 3: 4, 4: 3}),
        pytest.param(1, {1: 12, 3: 4, 4: 3}, marks=pytest.mark.slow),
        pytest.param(3, {1: 12, 3: 4, 4: 3}, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_goes_on_with_the_same_samples(
    project: Path, stage: int, batch_sizes: dict[int, int]
) -> None:
    """From 2 ranks to others: losses within the noise of another order of sums."""
    common = ("precision=fp32", f"zero_stage={stage}", *SHORT)
    assert train(project, f"whole-{stage}", *common, "batch_size=12", ranks=1)[0] == 0
    _, output = train(project, f"part-{stage}", *common, "batch_size=6", "exit_interval=3")
    assert "exitcode  : 75" in output, output
    expected = [record["loss"] for record in metrics(project, f"whole-{stage}")]
    for ranks, batch_size in batch_sizes.items():
        name = f"part-{stage}-{ranks}"
        shutil.copytree(project / "checkpoints_out" / f"part-{stage}", project / "checkpoints_out" / name)
        status, output = train(project, name, *common, f"batch_size={batch_size}", ranks=ranks)
        assert status == 0, output
        assert "dividing the optimizer state" in output
        assert f"world_size 2 -> {ranks}" in output
        losses = [record["loss"] for record in metrics(project, name)]
        assert losses == pytest.approx(expected, rel=1e-5)
