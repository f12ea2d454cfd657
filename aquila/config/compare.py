"""The configuration that the launcher checked and the one that a rank reads: they must be one and the same.

Both read the same files, each on its own machine and at its own moment: an edited file, a second copy on
another node, or a package of another release may lie between. Training with settings that nobody checked
would show weeks later.
"""

import json
import os
from pathlib import Path
from typing import Any

from aquila.config.effective import EffectiveConfig
from aquila.config.model import load_model_config
from aquila.core.checkpoints import STATE, read_state
from aquila.core.errors import UserError
from aquila.core.variables import LAUNCHED_CONFIG

_ABSENT = "nothing"


def settings_of(effective: EffectiveConfig) -> dict[str, Any]:
    """Every value that a run computes with, by a name that says where it stands; plain JSON values."""
    parts = {
        "": effective.run.model_dump(mode="json"),
        "config.json: ": effective.model.model_dump(mode="json"),
        "deepspeed.json: ": effective.deepspeed,
        "deepspeed.json: fp16.": effective.fp16,
    }
    values = {f"{where}{key}": value for where, part in parts.items() for key, value in part.items()}
    return json.loads(json.dumps(values))


def check_function(checkpoint: Path, effective: EffectiveConfig, world_size: int | None = None) -> list[str]:
    """Compares what the weights of a checkpoint computed with what this run's `config.json` makes of them.

    Returns a line for each change that `allow_model_changes` allows. Raises `UserError` naming the others,
    and for optimizer state that this run, on `world_size` ranks where that is known, cannot take over.
    """
    _check_optimizer(checkpoint, effective, world_size)
    then, now = load_model_config(checkpoint).function(), effective.model.function()
    changes = {key: f"{key} {then[key]} -> {now[key]}" for key in now if then[key] != now[key]}
    refused = [key for key in changes if key not in effective.run.allow_model_changes]
    if refused:
        raise UserError(
            f"{checkpoint / 'config.json'} and {effective.model_dir / 'config.json'} differ: "
            + "; ".join(changes[key] for key in refused)
            + ". The same weights would compute something else: put it back, or, where the change is meant, "
            f"add allow_model_changes=[{', '.join(refused)}]"
        )
    return [f"the model goes on with {change} (allow_model_changes)" for change in changes.values()]


def _check_optimizer(checkpoint: Path, effective: EffectiveConfig, world_size: int | None) -> None:
    """AdamW's moments and Muon's momentum are no exchange for one another, and Muon's stay as divided."""
    if not (checkpoint / STATE).is_file():
        return
    run, facts = effective.run, read_state(checkpoint)
    then, now = facts.get("optimizer", "auto"), run.optimizer
    if (then == "muon") != (now == "muon"):
        raise UserError(
            f"{checkpoint}: its optimizer state is of optimizer {then}, and the run's is {now}; put it back, "
            "or begin a new run from the checkpoint's weights"
        )
    if now != "muon":
        return
    here = {"world_size": world_size, "zero_stage": run.zero_stage, "precision": run.precision}
    for key, value in here.items():
        if value is not None and facts.get(key) != value:
            raise UserError(
                f"{checkpoint}: Muon's state goes on as it was divided, with {key} {facts.get(key)}; this "
                f"run has {value}; go on with that, or begin a new run from the checkpoint's weights"
            )


def check_launched(effective: EffectiveConfig) -> None:
    """Compares with what the launcher checked, where there was one.

    Raises `UserError` naming each key that differs, with both values.
    """
    told = os.environ.get(LAUNCHED_CONFIG)
    if not told:
        return
    launched, here = json.loads(told), settings_of(effective)
    differing = [
        f"{key} was {launched.get(key, _ABSENT)!r} for the launcher and is {here.get(key, _ABSENT)!r} here"
        for key in {**launched, **here}
        if launched.get(key, _ABSENT) != here.get(key, _ABSENT)
    ]
    if differing:
        raise UserError(
            "this rank reads another configuration than the launcher checked: "
            + "; ".join(differing)
            + f". Were {effective.config_path}, {effective.model_dir / 'config.json'} or deepspeed.json "
            "changed meanwhile, or do the nodes hold different copies? Make them alike and launch again"
        )
