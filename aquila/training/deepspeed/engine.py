"""The model under DeepSpeed: mixed precision, ZeRO, accumulation, clipping, the step.

DeepSpeed is imported in this folder alone; everything else speaks to `Engine`.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from aquila.config import EffectiveConfig
from aquila.core.errors import UserError
from aquila.model.files import TensorInfo
from aquila.model.linear import join_products
from aquila.training.deepspeed.checkpoint_engine import InMemoryCheckpointEngine, Snapshot, to_host
from aquila.training.deepspeed.config import PRECISIONS, deepspeed_config
from aquila.training.deepspeed.optimizer_state import refresh_weights, restore
from aquila.training.deepspeed.patches import why_not_blockwise
from aquila.training.deepspeed.safe_load import safely
from aquila.training.deepspeed.sharded_model import (
    own_weights,
    share_is_altered,
    weight_infos,
    whole_parameters,
)
from aquila.training.deepspeed.uncompiled import import_muon_uncompiled
from aquila.training.deepspeed.zero_step import step_in_use, use_blockwise_step, why_not
from aquila.training.nonfinite import GradientCheck

SHARDS = "deepspeed"
"""Folder inside a checkpoint that holds each rank's share of master weights and optimizer state."""


class MicroBatch(Protocol):
    """What one micro step takes: int64 and float32 tensors of shape (micro batch, sequence)."""

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def loss_mask(self) -> torch.Tensor: ...
    @property
    def documents(self) -> torch.Tensor | None: ...
    @property
    def corpora(self) -> torch.Tensor: ...


class StepFlags(NamedTuple):
    """What a rank tells the others with a step, or what all told.

    stop: save and stop, when any rank wants it. save: save and go on, when any does. written: the save in
    flight is written, when it is on every rank.
    """

    stop: bool
    save: bool
    written: bool

    @classmethod
    def of_all(cls, columns: Sequence[Sequence[float]]) -> "StepFlags":
        """From each flag's values on all ranks."""
        stop, save, written = columns
        return cls(any(stop), any(save), all(written))


NO_FLAGS = StepFlags(stop=False, save=False, written=False)


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, the same on every rank.

    loss: mean over ranks and micro steps. grad_norm: before clipping. skipped: the optimizer did
    not step because something was not finite, or the loss was a spike. rank_losses and
    forward_seconds: (world size,), to find who it was; of ranks that share samples each has its part of the
    loss. bad_gradient_ranks: whose own gradients were not finite. flags: what the ranks told one another
    with it.
    """

    loss: float
    grad_norm: float
    loss_scale: float
    skipped: bool
    spike: bool
    rank_losses: list[float]
    forward_seconds: list[float]
    bad_gradient_ranks: list[int]
    flags: StepFlags
    passed_over: bool = False
    """Not taken because the run says so (`skip_steps`): no loss is known."""
    corpus_losses: list[tuple[float, float]] = field(default_factory=list)
    """Of each corpus, where they are told apart: sum of its tokens' losses, and how many of them count."""


class Evaluation(NamedTuple):
    """Of the counted tokens of all ranks: mean loss in nats, how many they are, UTF-8 bytes of their text."""

    loss: float
    tokens: float
    bytes: float
    """0 where bytes are not known."""


@contextmanager
def _one_zero_optimizer() -> Iterator[None]:
    """One class for ZeRO-1 and ZeRO-2: for ZeRO-1 with bf16 summed in fp32 DeepSpeed would take another,
    which has neither a loss scale nor steps that are skipped."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    choose = DeepSpeedEngine._do_optimizer_sanity_check
    DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: "zero_optimization"
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


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
        config = deepspeed_config(effective, world_size)
        self.model = model
        self.world_size = world_size
        self._stage = effective.run.zero_stage
        self._is_muon = effective.run.optimizer == "muon"
        self._precision = effective.run.precision
        self._sharers = effective.run.sequence_parallel
        """Ranks that count the same sample, each a part of its losses."""
        if not self._is_muon:
            import_muon_uncompiled()
        with _one_zero_optimizer():
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        if self._stage < 3:  # it gathers weights anew, each time elsewhere
            join_products(model)  # ZeRO has moved the weights into its buffers
        self.tell_apart = 0
        """Corpora whose losses are summed on their own, and whose tokens that count are told."""
        self.unequal = False
        """Micro batches count unequal numbers of tokens: each token then weighs the same in a step."""
        self.alive: Callable[[], None] = lambda: None
        """Called while something takes long and goes on."""
        self._gradients = GradientCheck(self.device)
        seen, self.zero_step = self._choose_step(effective)
        if world_size > 1 and not seen:
            self._gradients.watch(model.parameters())
        scaler: Any = getattr(self._engine.optimizer, "loss_scaler", None)
        self.min_loss_scale = float(getattr(scaler, "min_scale", 1.0))
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # such steps are counted, and end in our own words

    def _choose_step(self, effective: EffectiveConfig) -> tuple[bool, str]:
        """Whether the gradient check sees gradients by itself, and a line on whose optimizer step runs."""
        import deepspeed

        asked, zero = effective.run.zero_step, self._engine.optimizer
        reason = "asked for" if asked == "deepspeed" else why_not_blockwise(deepspeed.__version__)
        if reason is None:
            reason = "ZeRO-3" if self._stage == 3 else why_not(zero)
        if reason is not None and asked == "blockwise":
            raise UserError(f"zero_step blockwise is not possible: {reason}; leave it at auto")
        seen = use_blockwise_step(zero, self._gradients) if reason is None else False
        words = f"optimizer step: {'deepspeed' if self._stage == 3 else step_in_use(zero)}"
        if reason is not None and asked != "deepspeed":
            words += f" ({reason})"
        if ignored := self._ignored(effective, seen):
            words += f"; not used by it: {', '.join(ignored)}"
        return seen, words

    def _ignored(self, effective: EffectiveConfig, exchanged: bool) -> list[str]:
        """Keys of zero_optimization that the user gave and the chosen step does not look at."""
        given = effective.deepspeed.get("zero_optimization", {})
        if self._stage == 3 or step_in_use(self._engine.optimizer) != "blockwise":
            return []
        unused = {"allgather_bucket_size", "allgather_partitions"}
        if exchanged or self.world_size == 1:
            unused |= {"reduce_bucket_size", "overlap_comm", "reduce_scatter"}
        return sorted(unused & given.keys())

    @property
    def loss_scale(self) -> float:
        """Of the next step; 1 without fp16."""
        return float(self._engine.optimizer.loss_scale)

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        learning_rate: float,
        *,
        flags: StepFlags = NO_FLAGS,
        spike_above: float | None = None,
    ) -> StepResult:
        """One optimizer step over `batches`, one micro step each; DeepSpeed averages over them.

        flags: this rank's, which travel with the losses, so that all ranks act on them at the same step.
        spike_above: skip the step, on all ranks, when the mean loss is above this.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._accumulate(len(batches))
        scale = self.loss_scale  # of this step; the step itself may change it
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        forward_seconds, spike = 0.0, False
        by_corpus = torch.zeros(2, self.tell_apart, device=self.device) if self.tell_apart else None
        weights = self._weights(batches)
        self._gradients.start()
        for number, batch in enumerate(batches, start=1):
            started = time.perf_counter()
            loss = self._loss(self._engine, batch, by_corpus)
            if weights is not None:
                loss = loss * weights[number - 1]
            total += loss.detach()
            forward_seconds += time.perf_counter() - started
            if spike_above is not None and number == len(batches):
                (losses,) = self.gather(total / len(batches))
                spike = sum(losses) / self.world_size > spike_above
            # An infinite gradient is skipped by DeepSpeed on all ranks together, and nothing else changes.
            self._engine.backward(loss * float("inf") if spike else loss)
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        values = (
            total / len(batches),
            self._gradients.total,
            math.nan if norm is None else norm,
            forward_seconds,
        )
        if by_corpus is not None:
            by_corpus[1] /= self._sharers
        sums = [] if by_corpus is None else list(by_corpus.flatten())
        losses, gradients, norms, seconds, *told = self.gather(*values, *flags, *sums)
        told, sums = told[: len(flags)], [sum(column) for column in told[len(flags) :]]
        skipped = bool(self._engine.optimizer.overflow)
        if self.world_size == 1:  # nobody to tell apart, and nobody looked
            gradients = [math.nan if skipped else 0.0]
        return StepResult(
            loss=sum(losses) / self.world_size,
            grad_norm=norms[0],
            loss_scale=scale,
            skipped=skipped,
            spike=spike,
            rank_losses=losses,
            forward_seconds=seconds,
            bad_gradient_ranks=[rank for rank, value in enumerate(gradients) if not math.isfinite(value)],
            flags=StepFlags.of_all(told),
            corpus_losses=list(zip(sums[: self.tell_apart], sums[self.tell_apart :], strict=True)),
        )

    def _weights(self, batches: Sequence[MicroBatch]) -> list[float] | None:
        """Of each micro batch its counted tokens over their mean of all; None where all count alike.

        The mean over ranks and micro steps is then the mean over the step's counted tokens.
        """
        if not self.unequal:
            return None
        counts = torch.stack([batch.loss_mask.sum() for batch in batches]).tolist()
        (totals,) = self.gather(sum(counts))
        mean = sum(totals) / (self.world_size * len(batches))
        return [count / mean if mean else 0.0 for count in counts]

    def pass_over(self, flags: StepFlags) -> StepResult:
        """A step that is not taken: nothing changes, and the flags travel all the same."""
        told = self.gather(*flags)
        return StepResult(
            loss=math.nan,
            grad_norm=math.nan,
            loss_scale=self.loss_scale,
            skipped=True,
            spike=False,
            rank_losses=[],
            forward_seconds=[],
            bad_gradient_ranks=[],
            flags=StepFlags.of_all(told),
            passed_over=True,
        )

    def _accumulate(self, micro_steps: int) -> None:
        """Lets DeepSpeed's next step be that many micro steps."""
        if micro_steps == self._engine.gradient_accumulation_steps():
            return
        micro_batch = self._engine.train_micro_batch_size_per_gpu()
        self._engine.set_train_batch_size(micro_steps * micro_batch * self.world_size)
        self._engine.micro_steps = 0  # it counts on from here: the end of a step is where it divides

    @staticmethod
    def _loss(
        module: torch.nn.Module, batch: MicroBatch, by_corpus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The batch's loss; `by_corpus` (2, corpora) gets the sums of its rows' losses and counted tokens."""
        inputs = {"labels": batch.labels, "loss_mask": batch.loss_mask, "documents": batch.documents}
        if by_corpus is None:
            return module(batch.tokens, **inputs)
        found: list[torch.Tensor] = []
        loss = module(batch.tokens, **inputs, token_losses=found)
        rows = torch.stack((found[0].sum(1), batch.loss_mask.sum(1)))
        by_corpus.index_add_(1, batch.corpora, rows)
        return loss

    @torch.no_grad()
    def evaluate(
        self, batches: Iterator[MicroBatch], token_bytes: torch.Tensor | None = None
    ) -> Evaluation | None:
        """The counted tokens of `batches` over all ranks, None without any; changes nothing.

        token_bytes: float32 (vocabulary,), UTF-8 bytes of each id.
        """
        total, count, size = 0.0, 0.0, 0.0
        self.model.eval()
        for batch in batches:
            told = [self._loss(self.model, batch).float(), batch.loss_mask.sum()]
            if token_bytes is not None:
                told.append((token_bytes[batch.labels] * batch.loss_mask).sum())  # whole: fp32 holds 2^24
            loss, counted, *lengths = torch.stack(told).tolist()  # one read, not three
            total += loss * counted / self._sharers
            count += counted / self._sharers
            size += sum(lengths) / self._sharers
            self.alive()
        self.model.train()
        totals, counts, sizes = self.gather(total, count, size)
        return Evaluation(sum(totals) / sum(counts), sum(counts), sum(sizes)) if sum(counts) else None

    def gather(self, *values: float | torch.Tensor) -> list[list[float]]:
        """For each value the list of what the ranks gave, in rank order."""
        there = [value.float() for value in values if isinstance(value, torch.Tensor)]
        read = iter(torch.stack(there).tolist() if there else [])
        here = [next(read) if isinstance(value, torch.Tensor) else float(value) for value in values]
        if self.world_size == 1:
            return [[value] for value in here]
        row = torch.tensor(here, dtype=torch.float64)
        # As pairs of int32: every communication library sends those, and not every one fp64.
        bits = row.view(torch.int32).to(self.device)
        table = torch.empty(self.world_size * bits.numel(), dtype=torch.int32, device=self.device)
        dist.all_gather_into_tensor(table, bits)
        return table.cpu().view(torch.float64).view(self.world_size, len(values)).t().tolist()

    def diverged_ranks(self) -> list[int]:
        """Ranks whose weights are not, bit for bit, the majority's. All ranks together.

        Under ZeRO-3 also those whose share is not what their master weights round to.
        """
        parameters: Iterable[tuple[str, torch.Tensor]] = self.model.named_parameters()
        altered = False
        if self._stage == 3:
            parameters, altered = whole_parameters(self.model), share_is_altered(self._engine.optimizer)
        # Weighted by place, so that two changes do not cancel; wraps around like any checksum.
        sums = (bit_sum(p) * (2 * i + 1) for i, (_, p) in enumerate(parameters))
        checksums, altered_ranks = self.gather(float(sum(sums) % (1 << 52)), altered)
        common = max(set(checksums), key=checksums.count)
        return [
            rank
            for rank, (checksum, altered) in enumerate(zip(checksums, altered_ranks, strict=True))
            if checksum != common or altered
        ]

    def snapshot_shards(self, folder: Path, *, copy: bool = True) -> list[Snapshot]:
        """This rank's share of master weights and optimizer state, as copies in host memory to be written
        below `folder`/deepspeed; without `copy` itself, to be written before the next step. All ranks
        together."""
        taken: list[Snapshot] = []
        writer, module_state = self._engine.checkpoint_engine, self._engine.module_state_dict
        self._engine.checkpoint_engine = InMemoryCheckpointEngine(taken, copy=copy)
        # The weights are saved beside, as a model folder that any tool reads; not a second time here.
        self._engine.module_state_dict = lambda **options: {}
        self._engine._copy_recovery_script = lambda path: None  # for folders without that model folder
        try:
            self._engine.save_checkpoint(str(folder), tag=SHARDS, save_latest=False)
        finally:
            self._engine.checkpoint_engine = writer
            self._engine.module_state_dict = module_state
        return taken

    def load_shards(self, folder: Path, world_size: int, precision: str) -> None:
        """Takes back what `snapshot_shards` gave on `world_size` ranks in `precision`, under any ZeRO stage.

        The model has the checkpoint's weights already. All ranks together. Raises `UserError`.
        """
        zero = self._engine.optimizer
        if whose := self._rigid_state():
            if world_size != self.world_size or precision != self._precision:
                raise UserError(
                    f"{folder}: {whose} goes on as it was divided, on {world_size} ranks in {precision}; "
                    f"this run has {self.world_size} in {self._precision}"
                )
            self._load_as_it_is(folder)
            return
        restore(zero, self.model, folder / SHARDS, world_size, PRECISIONS[precision])
        if precision != self._precision:
            refresh_weights(zero)

    def _rigid_state(self) -> str | None:
        """Optimizer state that cannot be divided anew, by name."""
        zero = self._engine.optimizer
        if self._is_muon:
            return "Muon's state"
        if getattr(zero, "swap_optimizer", False):
            return "state that is offloaded to files"
        # Its checkpoints name the places that parameters would have without it.
        return "the state of round_robin_gradients" if getattr(zero, "round_robin_gradients", False) else None

    def _load_as_it_is(self, folder: Path) -> None:
        """Rigid state, by DeepSpeed's hand: on the same ranks alone."""
        groups = self._engine.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        with safely():
            path, _ = self._engine.load_checkpoint(
                str(folder), tag=SHARDS, load_module_strict=False, load_lr_scheduler_states=False
            )
        # The run's own weight decay and the like: DeepSpeed's ZeRO-3 gives every group those of the first.
        for group, setting in zip(self._engine.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        # And one and the same step counter, which every parameter's update would then advance.
        for entry in self._engine.optimizer.optimizer.state.values():
            if isinstance(entry.get("step"), torch.Tensor):
                entry["step"] = entry["step"].clone()
        if path is None:
            raise UserError(f"{folder / SHARDS}: DeepSpeed cannot load this checkpoint")

    def weights(self, *, copy: bool = True) -> tuple[dict[str, torch.Tensor], list[dict[str, TensorInfo]]]:
        """This rank's part of all weights, as copies in host memory, and what each rank's part holds.

        Under ZeRO-3 about the same for every rank; else rank 0 has them all, without `copy` themselves. All
        ranks together.
        """
        if self._stage == 3:
            return own_weights(self.model, dist.get_rank(), self.world_size)
        weights: dict[str, torch.Tensor] = {}
        if dist.get_rank() == 0:
            weights.update(self.model.named_parameters())
        return to_host(weights) if copy else weights, [weight_infos(self.model)]


def bit_sum(values: torch.Tensor) -> int:
    """The sum of a tensor's numbers read as integers."""
    integer = {2: torch.int16, 4: torch.int32}[values.element_size()]
    return int(values.detach().view(integer).sum(dtype=torch.int64))
