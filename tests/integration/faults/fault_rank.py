"""`aquila.pretrain` with one fault planted by AQUILA_FAULT, `KIND:STEP:RANK`:

nan         the loss of that step and rank, and so its gradients, are not finite
nan-always  the same from that step on
spike       the loss of that step and rank is a hundred times as large
asleep      the rank sleeps for ever before that step
flip        one bit of the rank's weights changes after that step
clock       the wall clock goes back an hour at that step
"""

import os
import sys
import time

import torch

from aquila import pretrain
from aquila.errors import run_command
from aquila.training.engine import Engine, StepResult
from aquila.training.trainer import Trainer

KIND, STEP, RANK = os.environ["AQUILA_FAULT"].split(":")
HERE = int(RANK) == int(os.environ["RANK"])
_train_step, _loss, _trainer_step, _now = Engine.train_step, Engine._loss, Trainer._step, time.time
_state = {"step": 0}


def due() -> bool:
    return HERE and _state["step"] == int(STEP)


def loss(module: torch.nn.Module, batch: object) -> torch.Tensor:
    value = _loss(module, batch)
    poisoned = module.training and (due() or (HERE and KIND == "nan-always" and _state["step"] > int(STEP)))
    factor = {"nan": float("nan"), "nan-always": float("nan"), "spike": 100.0}.get(KIND, 1.0)
    return value * factor if poisoned else value


def step(trainer: Trainer) -> StepResult:
    _state["step"] = trainer.state.step + 1
    if KIND == "asleep" and due():
        while True:
            time.sleep(3600)
    if KIND == "clock" and _state["step"] >= int(STEP):
        time.time = lambda: _now() - 3600
    result = _trainer_step(trainer)
    if KIND == "flip" and due():
        weight = next(trainer.engine.model.parameters()).data.view(torch.int16)
        weight.view(-1)[5] ^= 1 << 3
    return result


Engine._loss = staticmethod(loss)
Trainer._step = step
if __name__ == "__main__":
    sys.argv[0] = "aquila.pretrain"
    run_command(pretrain.main)
