"""The fault suite at length, as a table: `bash scripts/soak.sh`."""

import argparse
import os
import random
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="bash scripts/soak.sh", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kill -9 of a random rank (default: 50)")
    parser.add_argument("--saves", type=int, default=50, help="kill -9 in the middle of a save (default: 50)")
    parser.add_argument("--terms", type=int, default=10, help="SIGTERM at random moments (default: 10)")
    parser.add_argument("--damages", type=int, default=10, help="of each kind, in random files (default: 10)")
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
    if os.geteuid() == 0:
        yield tried(scenarios.full_disk, project, "full-disk")


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
