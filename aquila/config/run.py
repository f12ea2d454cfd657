"""The run: every key of the YAML file and of `key=value`, typed, with its meaning beside it."""

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from aquila.config.model import FunctionKey
from aquila.config.strict import StrictModel
from aquila.core.errors import UserError

PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class LmEval(StrictModel):
    """`lm_eval`: lm-evaluation-harness over checkpoints, beside the training."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks, of the harness's own or of files in `include_path`."""
    every: PositiveInt
    """Steps; a multiple of `save_interval`, for checkpoints are scored."""
    include_path: str | None = None
    """Folder of task files; nothing is then asked of the internet."""
    num_fewshot: NonNegativeInt | None = None
    limit: PositiveInt | None = None
    """Examples of each task."""
    device: str = "cpu"
    """Where the harness computes."""


class RunConfig(StrictModel):
    """One training run. Keys of the original recipe keep their names; steps are optimizer steps."""

    # Batch and length of the run
    batch_size: PositiveInt = 1
    """Samples per device and micro step."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro steps per optimizer step."""
    epochs: PositiveInt = 1
    """Passes over the training split."""
    train_iters: PositiveInt | None = None
    """Optimizer steps of the whole run; overrides `epochs`."""
    batch_size_schedule: dict[NonNegativeInt, PositiveInt] = Field({})
    """Samples of a step over all devices, from after a step on: {0: 256, 1000: 512}; by accumulation."""
    skip_steps: list[str | PositiveInt] = Field([])
    """Steps whose samples are consumed, but that are not taken: numbers and ranges, [120-130, 200]."""
    exit_interval: PositiveInt | None = None
    """Save and stop with status 75 after every this many steps."""

    # Data
    data_prefix: list[str | float] = Field(["indexed_dataset/data/demo_text_document"])
    """Indexed datasets, without .bin/.idx: paths, or weights and paths in turn."""
    blend_schedule: dict[NonNegativeInt, str | list[str | float]] = Field({})
    """Other blends in place of `data_prefix`, from after a step on: {1000: [0.5, a, 0.5, b]}."""
    split: str = "90,10"
    """Shares of training, validation and (optionally) test documents."""
    seq_length: PositiveInt | None = None
    """Tokens a sample; the model's `max_seq_len` when absent."""
    seed: NonNegativeInt = 2023
    """Seed of data order and of weights that start from scratch."""
    valid_data: dict[str, str | list[str | float]] = Field({})
    """Validation sets beside the split's, each evaluated whole or to `eval_iters`: name and dataset(s)."""
    document_mask: bool = False
    """Attention stays within a document when several share a sample."""

    # Optimization
    lr: PositiveFloat = 2.0e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat | None = None
    """Learning rate at the end of the decay; a tenth of `lr` when absent."""
    warm_up: Share = 0.01
    """Share of all steps over which the learning rate rises linearly from 0."""
    warm_up_iters: NonNegativeInt | None = None
    """The same in steps; overrides `warm_up`."""
    lr_decay_style: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay after the warm-up; wsd: stable, then linear over the last `wsd_decay` share."""
    wsd_start: NonNegativeInt | None = None
    """Step after which wsd decays, to cool down from any checkpoint; overrides `wsd_decay`."""
    rewarm_from: NonNegativeInt | None = None
    """Step after which the learning rate rises from 0 again to its schedule, such as a checkpoint's."""
    rewarm_iters: PositiveInt | None = None
    """How many steps it rises then."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which `min_lr` is reached; the run's last step when absent."""
    wsd_decay: Share = 0.1
    """Share of all steps over which wsd decays."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay (AdamW) of the matrices; norms are exempt."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.95], min_length=2, max_length=2)
    """Adam's two decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""
    optimizer: str = "auto"
    """The AdamW implementation; auto takes the device's best. muon: Muon for the layers' matrices."""
    muon_lr: PositiveFloat = 0.02
    """Peak learning rate of Muon's matrices; it follows the schedule of `lr`."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of Muon's matrices."""

    # Numbers and kernels
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of weights and activations; master weights and optimizer state are fp32."""
    bmt_loss_scale: PositiveFloat = 131072
    """The dynamic loss scale's first value under fp16."""
    loss_scale_window: PositiveInt = 1000
    """Steps without overflow after which the loss scale doubles (fp16)."""
    fp8: Literal[False, "tensorwise", "rowwise"] = False
    """Layers multiply in float8 by this recipe of torchao, under bf16, best compiled; a CPU emulates it."""
    attention: Literal["auto", "fused", "triangle", "reference"] = "auto"
    """Attention kernel; auto: fused. The original's, where config.json has `use_triangle_attn`: triangle."""
    ckpoint_layer: Annotated[int, Field(ge=-1)] | None = None
    """Recompute the first N layers in backward, -1 all, 0 none; the model's own choice when absent."""
    recompute: Literal["full", "selective"] = "full"
    """What those layers recompute: all of the layer, or all but attention."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the loss's z-term, which keeps the softmax's normalizer near 1."""
    deterministic: bool = False
    """Only kernels that give the same bits each time, on devices that have others; slower there."""
    compile: bool | None = None
    """`torch.compile` of each block; the device's default when absent."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    zero_step: Literal["auto", "blockwise", "deepspeed"] = "auto"
    """Whose optimizer step runs under ZeRO-1 and 2: this project's, block by block, or DeepSpeed's own."""
    sequence_parallel: PositiveInt = 1
    """Neighbouring ranks that share each sample, for long contexts: each holds seq_length / N positions."""
    overlap_comm: bool | None = None
    """Gradients are reduced on a stream of their own during backward; absent: yes, on NPUs no."""

    # Weights and checkpoints
    bmt_pre_load: bool = False
    """Start from the weights in the model folder."""
    save_interval: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    save_optim: bool = True
    """Checkpoints hold the optimizer state (needed to resume exactly)."""
    save_rng: bool = True
    """Checkpoints hold the random state (needed to resume exactly)."""
    keep_checkpoints: NonNegativeInt = 0
    """Keep this many newest checkpoints; 0 keeps all."""
    keep_every: NonNegativeInt = 0
    """Keep, besides the newest, each checkpoint whose step is a multiple of this; 0 keeps none besides."""
    background_save: bool = True
    """Write checkpoints while training goes on, from a copy of the state in host memory."""
    export: Literal["none", "hf"] = "none"
    """hf: write a Hugging Face copy beside the checkpoints, checked by its logits."""
    export_every: PositiveInt = 1
    """With `export`: at every this many saves."""
    resume: str = "auto"
    """auto: from the experiment's newest checkpoint if there is one; never; or a checkpoint's path."""
    allow_model_changes: list[FunctionKey] = Field([])
    """Keys of config.json that may differ on resume, though the same weights then compute something else."""

    # Evaluation and logs
    log_interval: PositiveInt = 10
    """Steps between lines of the console, metrics.jsonl and TensorBoard."""
    eval_interval: NonNegativeInt = 1000
    """Steps between evaluations on the validation split; 0 never."""
    eval_iters: PositiveInt = 20
    """Sixteens of samples of one evaluation of each set, at most, whatever the batch size and devices."""
    eval_at_start: bool = True
    """Evaluate before the first step as well, unless `eval_interval` is 0."""
    eval_at_end: bool = True
    """Evaluate after the last step as well, unless `eval_interval` is 0."""
    lm_eval: LmEval | None = None
    """Scores of lm-evaluation-harness beside training: {tasks: [...], every: N, include_path: DIR}."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb: bool = False
    """Write Weights & Biases files as well, offline unless WANDB_MODE says otherwise."""
    profile: str | None = None
    """Steps to profile, such as 10-12: trace, longest kernels and pauses, in the run folder's profile/."""

    # Faults
    max_bad_steps: PositiveInt = 10
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    skip_spikes: Annotated[float, Field(gt=1)] | None = None
    """Skip a step whose loss is more than this many times the running mean."""
    replica_check_interval: NonNegativeInt = 1000
    """Steps between comparisons of the weights of all ranks; 0 never."""
    hang_timeout: NonNegativeFloat = 1800
    """Seconds without a finished step after which the whole run ends with every rank's stack; 0 never."""

    save_timeout: NonNegativeFloat = 7200
    """Seconds that writing a checkpoint may take before it counts as standing still; 0 for ever."""
    group_timeout: PositiveFloat = 1800
    """Seconds that ranks wait for one another in a single exchange."""

    # Nodes (read by the launch scripts)
    max_restarts: NonNegativeInt = 0
    """How often ranks are started again from the newest checkpoint after a failure or a lost node."""
    rejoin_timeout: NonNegativeFloat = 600
    """Seconds to wait for a lost node before going on without it, or giving up."""
    min_nodes: PositiveInt | None = None
    """Go on with this many nodes when others do not come back; all of them are needed when absent."""
    node_timeout: PositiveFloat = 60
    """Seconds without a sign of life after which a node counts as lost."""

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        parse_split(self.split)
        parse_blend(self.data_prefix)
        for name, blend in self.valid_data.items():
            _check_set(name, blend)
        for step, blend in self.blend_schedule.items():
            _check_blend(f"blend_schedule: {step}", blend)
        parse_steps(self.skip_steps)
        if self.profile is not None:
            profiled_steps(self.profile)
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is larger than lr {self.lr:g}")
        return self

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the decay."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def datasets(self) -> list[str]:
        """Every dataset that the run reads, each once."""
        later = [*self.blend_schedule.values(), *self.valid_data.values()]
        blends = [self.data_prefix, *map(as_blend, later)]
        return list(dict.fromkeys(prefix for blend in blends for prefix in parse_blend(blend)[0]))

    @property
    def blends(self) -> list[tuple[int, list[str | float]]]:
        """(step, blend of the steps after it) from step 0 on, in order."""
        later = {step: as_blend(blend) for step, blend in self.blend_schedule.items()}
        return sorted(({0: self.data_prefix} | later).items())

    def skips(self, step: int) -> bool:
        """Whether `skip_steps` names this step, counted from 1."""
        return any(step in steps for steps in parse_steps(self.skip_steps))

    def replicas(self, world_size: int) -> int:
        """Groups of `sequence_parallel` devices, each with samples of its own. Raises `UserError`."""
        if world_size % self.sequence_parallel:
            raise UserError(
                f"sequence_parallel {self.sequence_parallel} does not divide the {world_size} device(s) of "
                "the run; take a number that does, or other devices"
            )
        return world_size // self.sequence_parallel

    def global_batch_size(self, world_size: int) -> int:
        """Samples per optimizer step over all devices."""
        return self.batch_size * self.gradient_accumulation_steps * self.replicas(world_size)


def as_blend(data: str | list[str | float]) -> list[str | float]:
    """Paths, or weights and paths in turn, from a list or from one text of words.

    A text with blanks is one path where there is such a dataset.
    """
    if not isinstance(data, str):
        return data
    return [data] if Path(f"{data}.idx").is_file() else list(data.split())


def _check_set(name: str, blend: str | list[str | float]) -> None:
    if not re.fullmatch(r"[\w][\w.+-]*", name) or name == "split":
        raise ValueError(
            f"valid_data: {name!r} cannot name a set; use letters, digits, '.', '_', '+' and '-', not 'split'"
        )
    _check_blend(f"valid_data: {name}", blend)


def _check_blend(where: str, blend: str | list[str | float]) -> None:
    try:
        parse_blend(as_blend(blend))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def parse_steps(steps: list[str | int]) -> list[range]:
    """Numbers and ranges 'a-b', both ends included. Raises `ValueError` for anything else."""
    ranges = []
    for text in steps:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(text))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"skip_steps: {text!r} is no step and no range of steps, such as 120-130")
        ranges.append(range(first, last + 1))
    return ranges


def batch_sizes(run: RunConfig, world_size: int) -> list[tuple[int, int]]:
    """(step, samples of each step after it) from step 0 on, in order.

    Raises `UserError` for a size of `batch_size_schedule` that `world_size` devices cannot share.
    """
    micro = run.batch_size * run.replicas(world_size)
    parts = "batch_size x devices" + " / sequence_parallel" * (run.sequence_parallel > 1)
    for step, samples in run.batch_size_schedule.items():
        if samples % micro:
            below = samples // micro * micro
            raise UserError(
                f"batch_size_schedule: {step}: {samples} samples do not divide by {parts} = {micro}; "
                f"near ones that do are {below or micro} and {below + micro}"
            )
    return sorted(({0: run.global_batch_size(world_size)} | run.batch_size_schedule).items())


def parse_split(split: str) -> list[float]:
    """'90,10' to normalized shares of train, valid, test. Raises `ValueError` for anything else."""
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        raise ValueError(f"split '{split}': give shares of train, valid[, test], such as '90,10'") from None
    if not all(map(math.isfinite, shares)):
        raise ValueError(f"split '{split}': a share is not a finite number")
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or shares[0] <= 0:
        raise ValueError(f"split '{split}': give one to three shares, the first above 0, such as '90,10'")
    shares += [0.0] * (3 - len(shares))
    return [share / sum(shares) for share in shares]


def profiled_steps(text: str) -> range:
    """'10-12' to the steps 10, 11 and 12; '10' is one step. Raises `ValueError` for anything else."""
    if not re.fullmatch(r"[0-9]{1,9}(-[0-9]{1,9})?", text):
        raise ValueError(f"profile '{text}': give the first and the last step, such as '10-12'")
    first, _, last = text.partition("-")
    steps = range(int(first), int(last or first) + 1)
    if not steps or steps[0] < 1 or len(steps) > 100:
        raise ValueError(f"profile '{text}': 1 to 100 steps, counted from 1, the first before the last")
    return steps


def parse_blend(data_prefix: list[str | float]) -> tuple[list[str], list[float] | None]:
    """Paths, or weights and paths in turn, to (paths, weights or None). Raises `ValueError`."""
    if not data_prefix:
        raise ValueError("data_prefix is empty: name at least one indexed dataset")
    weights = [_weight(item) for item in data_prefix]
    if all(weight is None for weight in weights):
        return [str(path) for path in data_prefix], None
    in_turn = len(data_prefix) % 2 == 0 and all(
        (w is not None) == (i % 2 == 0) for i, w in enumerate(weights)
    )
    if not in_turn:
        raise ValueError("data_prefix: give paths only, or a weight before every path: [0.7, a, 0.3, b]")
    chosen = [weight for weight in weights if weight is not None]
    if not all(map(math.isfinite, [*chosen, sum(chosen)])):
        raise ValueError("data_prefix: a weight is not a finite number")
    if min(chosen) <= 0:
        raise ValueError("data_prefix: weights must be above 0; leave out what is not wanted")
    return [str(path) for path in data_prefix[1::2]], chosen


def _weight(item: str | float) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def find_config(name: str | Path, root: Path) -> Path | None:
    """The YAML file meant by `name`: as given, else in `root`, else in `root/configs`."""
    places = [Path(name), root / name, root / "configs" / name]
    return next((place for place in places if place.is_file()), None)
