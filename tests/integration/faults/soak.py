"""The fault suite at length, as a table: `bash scripts/soak.sh`."""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.integration.faults import scenarios
from tests.integration.faults.scenarios import Outcome
from tests.integration.training_runs import make_project

HARM = {
    "truncated file": scenarios.cut_short,
    "flipped bit": scenarios.flip_bit,
    "missing file": scenarios.remove,
}
OTHERS = {
    "SIGTERM while saving": "test_sigterm_while_a_checkpoint_is_on_its_way_loses_neither",
    "second SIGINT": "test_a_second_ctrl_c_ends_at_once",
    "read-only folder": "test_a_read_only_folder_is_one_clear_message",
    "NaN in one loss": "test_a_nan_is_skipped_by_all_ranks_and_told_with_its_documents",
    "NaN in one gradient": "test_a_bad_gradient_is_told_with_its_rank_where_every_loss_was_good",
    "NaN for ever": "test_nan_for_ever_gives_up_with_advice",
    "fp16 overflow": "test_the_fp16_loss_scale_falls_rises_and_survives_a_stop",
    "a loss spike": "test_a_spike_is_left_out",
    "a rank asleep": "test_a_rank_asleep_ends_the_run_and_is_named",
    "a frozen rank": "test_a_rank_that_does_not_even_answer_is_named",
    "a diverged replica": "test_a_diverged_replica_is_found",
    "two runs in one folder": "test_two_runs_in_one_folder_and_a_save_on_request",
    "clock set back": "test_a_clock_set_back_changes_nothing",
    "a slow disk": "test_a_disk_slower_than_hang_timeout_ends_nothing",
    "hostile checkpoint": "../test_hostile_checkpoint.py::test_no_file_of_a_checkpoint_runs_code",
}
"""Faults without dice, that end with a message and a status: the test of each, once."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash scripts/soak.sh", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kill -9 of a random rank (default: 50)")
    parser.add_argument("--saves", type=int, default=50, help="kill -9 in the middle of a save (default: 50)")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERM at random moments (default: 10)")
    parser.add_argument("--damages", type=int, default=10, help="of each other kind, with dice (default: 10)")
    parser.add_argument(
        "--others", type=int, default=1, choices=(0, 1), help="faults with a message (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for number, outcome in enumerate(run(make_project(Path(folder)), arguments), start=1):
            outcomes.append(outcome)
            state = "survived" if outcome.survived else "NOT SURVIVED"
            print(
                f"{number:4}  {outcome.fault:22}  {state}, {outcome.steps_lost} lost; {outcome.note}",
                flush=True,
            )
    print_table(outcomes)
    return 0 if all(outcome.survived for outcome in outcomes) else 1


def run(project: Path, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Every fault in turn, each in an experiment of its own."""
    scenarios.undisturbed(project)
    dice = random.Random(arguments.seed)
    kinds: list[tuple[str, int, Callable]] = [
        ("kill", arguments.kills, scenarios.killed_at_random),
        ("save", arguments.saves, scenarios.killed_while_saving),
        ("term", arguments.terms, scenarios.terminated),
    ]
    for name, count, scenario in kinds:
        for number in range(count):
            yield tried(scenario, project, f"{name}-{number}", dice)
    for what, harm in HARM.items():
        for number in range(arguments.damages):
            name = f"{what.replace(' ', '-')}-{number}"
            yield tried(scenarios.damaged, project, name, dice, harm, what)
    for number in range(arguments.damages):
        yield tried(scenarios.frozen, project, f"frozen-{number}", dice)
        yield tried(scenarios.torn_side_files, project, f"torn-{number}", dice)
    if os.geteuid() == 0:
        yield tried(scenarios.full_disk, project, "full-disk")
    for what, test in OTHERS.items() if arguments.others else ():
        yield tested(what, test)


def tested(what: str, test: str) -> Outcome:
    """The outcome of one test of the suite at a small size."""
    place = str(Path(__file__).parent / (test if "::" in test else f"test_faults.py::{test}"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", place]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    passed = done.returncode == 0 and "passed" in "".join(last)
    return Outcome(what, passed, 0, "".join(last) if passed else done.stdout[-2000:])


def tried(scenario: Callable[..., Outcome], project: Path, experiment: str, *arguments: object) -> Outcome:
    """The outcome; a scenario that itself breaks off is a fault not survived, and the rest goes on."""
    try:
        return scenario(project, experiment, *arguments)
    except Exception:
        return Outcome(f"{scenario.__name__} broke off", False, 0, traceback.format_exc())


def print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'fault':24}{'tried':>6}{'survived':>10}{'steps lost, mean':>18}{'most':>6}")
    for fault in dict.fromkeys(outcome.fault for outcome in outcomes):
        of_this = [outcome for outcome in outcomes if outcome.fault == fault]
        lost = [outcome.steps_lost for outcome in of_this]
        survived = sum(outcome.survived for outcome in of_this)
        print(f"{fault:24}{len(of_this):>6}{survived:>10}{sum(lost) / len(lost):>18.1f}{max(lost):>6}")
    print(f"{time.strftime('%Y-%m-%d')}, {scenarios.STEPS} steps a run, a save every 4")


if __name__ == "__main__":
    sys.exit(main())
