"""Muon by DeepSpeed's implementation: hidden matrices orthogonalized, AdamW for all else.

Muon (Jordan and others, https://kellerjordan.github.io/posts/muon/): the momentum of a matrix is replaced by
about the nearest orthogonal matrix, times sqrt(max(1, rows / columns)). DeepSpeed's ZeRO-1 and 2 do that as
they sum the gradients, so its own step is taken, and the gradient norm that it tells is that of the updates.
"""

from typing import Any

import torch

from aquila.config import RunConfig
from aquila.model import AquilaModel

LAYERS = "layers."


def make_muon(model: AquilaModel, run: RunConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer, with a group each for hidden matrices, embedding and output, and vectors."""
    if device.type == "cpu" and not run.compile:
        torch.compiler.set_stance(
            "force_eager"
        )  # DeepSpeed compiles the iteration: minutes, and no gain here
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    hidden: list[torch.nn.Parameter] = []
    tables: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1
        use_muon = matrix and name.startswith(LAYERS)
        parameter.use_muon = use_muon  # type: ignore[attr-defined]  # where ZeRO looks for it
        (hidden if use_muon else tables if matrix else vectors).append(parameter)
    adam = {"use_muon": False, "lr": run.lr, "betas": tuple(run.betas), "eps": run.eps}
    groups: list[dict[str, Any]] = [
        {
            "params": hidden,
            "use_muon": True,
            "lr": run.muon_lr,
            "lr_scale": run.muon_lr / run.lr,
            "momentum": run.muon_momentum,
            "weight_decay": run.weight_decay,
        },
        {**adam, "params": tables, "weight_decay": run.weight_decay},
        {**adam, "params": vectors, "weight_decay": 0.0},
    ]
    return MuonWithAuxAdam(groups)
