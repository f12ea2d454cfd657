"""Which checkpoint a run goes on from, and taking it back, on the same ranks or on others."""

import os
from pathlib import Path
from typing import Any

from aquila.config import EffectiveConfig
from aquila.config.compare import check_function
from aquila.core.checkpoints import (
    FOLDER,
    LATEST,
    STATE,
    clear_leftovers,
    find_corruption,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    set_aside,
    step_of,
)
from aquila.core.errors import UserError
from aquila.core.files import write_atomically
from aquila.core.text_files import is_finite
from aquila.training.console import say
from aquila.training.deepspeed.config import PRECISIONS
from aquila.training.deepspeed.engine import SHARDS, Engine
from aquila.training.deepspeed.safe_load import load
from aquila.training.rng import restore_random_state
from aquila.training.state import TrainState


def launch_id() -> str | None:
    """What all starts of one launch share, restarts included; None where nobody says.

    Our launcher marks every rank with its own name and the node's number.
    """
    mark = os.environ.get("AQUILA_LAUNCH_MARK", "")
    return mark.rpartition("-")[0] or None


def find_resume(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, verified; None to start anew. Tidies up what a killed process left.

    With `auto` a damaged checkpoint is named and the newest whole one before it is used. `never` and a
    path are for the first start of a launch: its restarts go on from what it has saved since. Checkpoints
    that are then no part of the run's past are set aside, so that nobody goes on from them by mistake.
    Raises `UserError` for a given path that is no whole checkpoint, and when none of several is whole.
    """
    checkpoints = run_dir / FOLDER
    clear_leftovers(checkpoints)
    if resume == "auto":
        return _newest_whole(checkpoints)
    ours = [path for path in list_checkpoints(checkpoints) if _of_this_launch(path)]
    if ours:
        return _newest_whole(checkpoints)
    chosen = None if resume == "never" else Path(resume)
    if chosen and (problem := find_corruption(chosen)):
        raise UserError(f"resume={resume}: {problem}")
    _set_aside_other(checkpoints, chosen)
    return chosen


def _newest_whole(checkpoints: Path) -> Path | None:
    found, problems = newest_checkpoint(checkpoints)
    for problem in problems:
        say(f"warning: {problem}")
    if problems and not found:
        raise UserError(
            f"none of the {len(problems)} checkpoints in {checkpoints} is whole; "
            "restore one, or start anew under another experiment name or with resume=never"
        )
    return found


def _of_this_launch(checkpoint: Path) -> bool:
    """Whether an earlier start of this very launch saved it: torchrun's restart, or our launcher's."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return True  # the first start has set aside whatever was there
    try:
        return launch_id() is not None and read_state(checkpoint).get("launch") == launch_id()
    except (OSError, ValueError, AttributeError):
        return False


def _set_aside_other(checkpoints: Path, chosen: Path | None) -> None:
    """Moves away what does not lead to `chosen`, and lets `latest` name that, or nothing."""
    found = list_checkpoints(checkpoints)
    end = chosen.resolve() if chosen is not None else None
    if end is not None and end.parent != checkpoints.resolve():
        end = None
    other = [path for path in found if end is None or step_of(path) > step_of(end)]
    if not other:
        return
    if end is not None:
        write_atomically(checkpoints / LATEST, end.name + "\n")
    else:
        (checkpoints / LATEST).unlink(missing_ok=True)
    target = set_aside(other)
    say(f"{len(other)} checkpoints that this run does not go on from are set aside in {target}")


class Resumption:
    """A checkpoint to be taken back: by the engine that is built for it, and then by this rank."""

    def __init__(self, folder: Path, effective: EffectiveConfig, world_size: int) -> None:
        self.folder = folder
        self.facts = _facts(folder)
        self.model_changes = check_function(folder, effective, world_size)
        """A line for each change of what the weights compute."""
        self.has_optimizer = (folder / SHARDS).is_dir()
        now: dict[str, Any] = {"world_size": world_size, "zero_stage": effective.run.zero_stage}
        now["precision"] = effective.run.precision
        self.changes = {k: (self.facts[k], v) for k, v in now.items() if self.facts[k] != v}
        """What is not as it was, by name: (then, now)."""

    def load(self, engine: Engine, rank: int) -> TrainState:
        """Optimizer, master weights and random state; the model has its weights already."""
        if self.has_optimizer:
            if self.changes and rank == 0:
                changes = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in self.changes.items())
                say(f"dividing the optimizer state of {self.folder} anew ({changes})")
            engine.load_shards(self.folder, int(self.facts["world_size"]), self.facts["precision"])
        elif rank == 0:
            say(f"warning: {self.folder} holds no optimizer state: this run is not exact")
        own = self.folder / "rng" / f"rank-{rank:05d}.pt"
        if own.is_file():
            _restore_random_state(own)
        return TrainState(**{key: self.facts[key] for key in TrainState.__dataclass_fields__})


def _facts(folder: Path) -> dict[str, Any]:
    """`state.json`, with a number wherever the run counts on one."""
    facts = {"sequence_parallel": 1} | read_state(folder)  # without one it is of before there was any
    counts = ("world_size", "zero_stage", "batch_size", "gradient_accumulation_steps", "sequence_parallel")
    wrong = [
        key
        for key in (*TrainState.__dataclass_fields__, *counts)
        if not isinstance(facts.get(key), int | float) or not is_finite(facts[key])
    ]
    if wrong or facts.get("precision") not in PRECISIONS:
        what = ", ".join(wrong) or "precision"
        raise UserError(f"{folder / STATE}: {what} is missing or wrong; use another checkpoint")
    return facts


def _restore_random_state(file: Path) -> None:
    state = load(file)
    try:
        restore_random_state(state)
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError) as error:
        raise UserError(f"{file}: no random state ({error}); remove the file to go on without") from None


def same_samples_per_step(facts: dict[str, Any], effective: EffectiveConfig, world_size: int) -> str | None:
    """A warning when a step now takes another number of samples than in the checkpoint's run."""
    if effective.run.batch_size_schedule:
        return None  # the schedule says how many
    replicas = facts["world_size"] // max(1, facts["sequence_parallel"])
    then = facts["batch_size"] * facts["gradient_accumulation_steps"] * replicas
    now = effective.run.global_batch_size(world_size)
    if then == now:
        return None
    return (
        f"warning: a step takes {now} samples instead of {then}: the order of samples is the same, "
        "losses of single steps are not; total steps and schedule follow the new number"
    )
