"""The model under DeepSpeed: processes, mixed precision, ZeRO, accumulation, clipping, the step.

The only importer of DeepSpeed. Everything else speaks to `Engine`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from aquila.config import EffectiveConfig
from aquila.errors import UserError

Result = TypeVar("Result")
SHARDS = "deepspeed"
"""Folder inside a checkpoint that holds each rank's share of master weights and optimizer state."""


class MicroBatch(Protocol):
    """What one micro step takes: int64 and float32 tensors of shape (micro batch, sequence)."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    documents: torch.Tensor | None


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, the same on every rank.

    loss: mean over ranks and micro steps. grad_norm: before clipping. skipped: the optimizer did
    not step because something was not finite. rank_losses: (world size,), to find who it was.
    stop: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    loss_scale: float
    skipped: bool
    rank_losses: list[float]
    stop: bool


@contextmanager
def processes(communication: str, device: torch.device) -> Iterator[tuple[int, int]]:
    """The process group of this run, as (rank, world size); destroyed at the end.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them; without
    them this process is a world of one.
    """
    # Said outright, for DeepSpeed otherwise guesses, and falls back to CPU without a word.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    quiet_libraries()
    import deepspeed

    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = "0"
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory collective that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _free_port_for_one()
    deepspeed.init_distributed(dist_backend=communication, auto_mpi_discovery=False, verbose=False)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_first_rank(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, on every rank; its `UserError` is raised on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _free_port_for_one() -> None:
    """A world of one needs no agreed port: any free one will do."""
    if os.environ["MASTER_PORT"] == "0":
        import socket

        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


def quiet_libraries() -> None:
    """Leaves warnings and errors of DeepSpeed, and drops its running commentary."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class Engine:
    """A model that trains: forward, backward, reduction, clipping and step, on all ranks together."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        effective: EffectiveConfig,
        world_size: int,
    ) -> None:
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.model = model
        self.world_size = world_size
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(effective), dist_init_required=False
        )
        self._stage = effective.run.zero_stage

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def train_step(
        self, batches: Sequence[MicroBatch], learning_rate: float, *, stop_requested: bool = False
    ) -> StepResult:
        """One optimizer step over `batches`, one micro step each; DeepSpeed averages over them."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        scale = float(self._engine.optimizer.loss_scale)  # of this step; the step itself may change it
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in batches:
            loss = self._engine(
                batch.tokens, labels=batch.labels, loss_mask=batch.loss_mask, documents=batch.documents
            )
            self._engine.backward(loss)
            total += loss.detach()
            self._engine.step()
        mean = total / len(batches)
        losses, stops = self.gather(mean, stop_requested)
        norm = self._engine.get_global_grad_norm()
        return StepResult(
            loss=sum(losses) / len(losses),
            grad_norm=float(norm) if norm is not None else float("nan"),
            loss_scale=scale,
            skipped=bool(self._engine.optimizer.overflow),
            rank_losses=losses,
            stop=any(stops),
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch] | Iterator[MicroBatch]) -> float:
        """Mean loss of the counted tokens of `batches` over all ranks; no gradients, nothing changed."""
        total = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for batch in batches:
            loss = self.model(
                batch.tokens, labels=batch.labels, loss_mask=batch.loss_mask, documents=batch.documents
            )
            count = batch.loss_mask.sum().item()
            total += torch.tensor([loss.item() * count, count], dtype=torch.float64)
        self.model.train()
        sums, counts = self.gather(*total.tolist())
        return sum(sums) / max(1.0, sum(counts))

    def gather(self, *values: float | torch.Tensor) -> list[list[float]]:
        """For each value the list of what the ranks gave, in rank order."""
        row = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in values]
        )
        table = torch.empty(self.world_size * len(values), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(table, row)
        return table.view(self.world_size, len(values)).t().tolist()

    def save_shards(self, folder: Path) -> None:
        """Writes this rank's share of master weights and optimizer state into `folder`/deepspeed."""
        # The weights are saved beside, as a model folder that any tool reads; not a second time here.
        self._engine.module_state_dict = lambda **options: {}
        self._engine.save_checkpoint(str(folder), tag=SHARDS, save_latest=False)
        del self._engine.module_state_dict
        if dist.get_rank() == 0:
            for script in folder.glob("zero_to_*.py"):  # DeepSpeed's, for folders without the weights
                script.unlink()

    def load_shards(self, folder: Path) -> None:
        """Takes back what `save_shards` of the same number of ranks wrote. Raises `UserError`."""
        path, _ = self._engine.load_checkpoint(
            str(folder), tag=SHARDS, load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:
            raise UserError(f"{folder / SHARDS}: DeepSpeed cannot load this checkpoint")

    def weights(self) -> dict[str, torch.Tensor] | None:
        """All weights in the training dtype; with ZeRO-3 on rank 0 alone, elsewhere None."""
        if self._stage < 3:
            return dict(self.model.state_dict())
        return self._engine._zero3_consolidated_16bit_state_dict()


def deepspeed_config(effective: EffectiveConfig) -> dict[str, Any]:
    """What DeepSpeed is told: our run keys, over what `deepspeed.json` says to it alone."""
    run = effective.run
    zero = {"contiguous_gradients": True, "overlap_comm": True, "reduce_scatter": True}
    zero |= effective.deepspeed.get("zero_optimization", {}) | {"stage": run.zero_stage}
    config = effective.deepspeed | {
        "train_micro_batch_size_per_gpu": run.batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "gradient_clipping": run.clip_grad,
        "steps_per_print": 2**31 - 1,  # the console is ours
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if run.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if run.precision == "fp16":
        config["fp16"] = effective.fp16 | {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": max(0, round(run.bmt_loss_scale).bit_length() - 1),
            "loss_scale_window": run.loss_scale_window,
        }
    if run.precision != "fp32" and run.gradient_accumulation_steps > 1:
        # Sums over many micro steps in 16 bits would lose the small gradients.
        config.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return config


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms) without, as in the original recipe."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
