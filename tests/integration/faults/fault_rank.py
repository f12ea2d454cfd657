"""`aquila.pretrain` with one fault planted by AQUILA_FAULT, `KIND:STEP:RANK`:

nan          the loss of that step and rank, and so its gradients, are not finite
nan-always   the same from that step on
grad         the gradients of that step and rank alone are not finite
grad-always  the same from that step on
spike        the loss of that step and rank is a hundred times as large
asleep       the rank sleeps for ever before that step
flip         one bit of the rank's weights changes after that step
clock        the wall clock goes back an hour at that step
slow-disk    from that step on each fsync of the rank takes two seconds
none         nothing

With precision=fp16 DeepSpeed is told that this CPU can do it, as torch can: slowly, but all the same.
"""

import os
import sys
import time

import torch

from aquila import pretrain
from aquila.backend import cpu
from aquila.core.errors import run_command
from aquila.training.deepspeed.engine import Engine, StepResult
from aquila.training.trainer import Trainer

KIND, STEP, RANK = os.environ["AQUILA_FAULT"].split(":")
HERE = int(RANK) == int(os.environ["RANK"])
_train_step, _loss, _trainer_step, _now = Engine.train_step, Engine._loss, Trainer._step, time.time
_fsync = os.fsync
_state = {"step": 0}


def due() -> bool:
    return HERE and _state["step"] == int(STEP)


def struck() -> bool:
    """Due, or past due where the fault stays."""
    return due() or (HERE and KIND.endswith("-always") and _state["step"] > int(STEP))


def loss(module: torch.nn.Module, batch: object, *rest: object) -> torch.Tensor:
    value = _loss(module, batch, *rest)
    if not (module.training and struck()):
        return value
    if KIND.startswith("grad"):
        value.register_hook(lambda gradient: gradient * float("nan"))
    return value * {"nan": float("nan"), "nan-always": float("nan"), "spike": 100.0}.get(KIND, 1.0)


def slow_fsync(file: int) -> None:
    time.sleep(2)
    print("a slow fsync", flush=True)
    _fsync(file)


def step(trainer: Trainer) -> StepResult:
    _state["step"] = trainer.state.step + 1
    if KIND == "asleep" and due():
        while True:
            time.sleep(3600)
    if KIND == "slow-disk" and due():
        os.fsync = slow_fsync
    if KIND == "clock" and _state["step"] >= int(STEP):
        time.time = lambda: _now() - 3600
    result = _trainer_step(trainer)
    if KIND == "flip" and due():
        weight = next(trainer.engine.model.parameters()).data.view(torch.int16)
        weight.view(-1)[5] ^= 1 << 3
    return result


def allow_fp16() -> None:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda accelerator: True
    cpu.supported_precisions = lambda: ("fp16", "bf16", "fp32")


if "precision=fp16" in sys.argv:
    allow_fp16()
Engine._loss = staticmethod(loss)
Trainer._step = step
if __name__ == "__main__":
    sys.argv[0] = "aquila.pretrain"
    run_command(pretrain.main)
