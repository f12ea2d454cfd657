"""How much memory a device needs to train a model, and how much it sends: from shapes alone, no torch.

Symbols: P parameters, N devices, T = batch_size x sequence tokens of a micro step, b bytes of the
training dtype. Sources: ZeRO (arXiv 1910.02054, section 3 and 7.2) for states and traffic; the list of
saved activations is that of `model/aquila.py`, counted with autograd's saved-tensor hooks and tested
against them; the whole is tested against measured peaks.

Frozen: nothing. Free: everything that keeps within 15 % of the measured peaks; constants named "as in" follow
their file. Guarded by: tests/unit/planning/, tests/integration/test_launch_memory.py.
"""

from dataclasses import dataclass

from aquila.config import EffectiveConfig, ModelConfig

GIB = 2**30
LOGITS_BYTES = {2: 200 << 20, 4: 150 << 20}
LARGEST_LOGITS_BYTES = 1 << 30
MAX_ROUNDINGS = 4
"""As in `model/loss.py`: bytes of a chunk of logits, by bytes of a number; chunks summed in the dtype."""
STEP_BLOCK_CPU, STEP_BLOCK = 1 << 19, 1 << 26
"""As in `training/deepspeed/zero_step.py`: elements of a block of the optimizer step."""
TRIANGLE_BLOCK = 512
REDUCE_BUCKET = 5e8
"""DeepSpeed's default `reduce_bucket_size`, in elements."""
LIVE_PARAMETERS = 1e9
"""DeepSpeed's default `stage3_max_live_parameters`: ZeRO-3 gathers up to this many at a time."""


@dataclass(frozen=True)
class TrainingSetup:
    """What the memory of one device depends on, besides the model."""

    devices: int
    batch_size: int
    seq_length: int
    precision: str = "bf16"
    zero_stage: int = 2
    offload: bool = False
    sequence_parallel: int = 1
    """Devices that share each sample."""
    hpz: int = 1
    """`zero_hpz_partition_size`: devices that hold a second copy of ZeRO-3's weights together."""
    checkpointed_layers: int = 0
    gradient_accumulation_steps: int = 1
    attention: str = "fused"
    one_pass: bool = False
    """The gate keeps no silu, cosines and sines are those of all layers (a CPU's compiled passes, an NPU).

    A CPU without a compiler keeps more: fp32 copies of the norms' inputs.
    """
    statistics: int = 4
    """Bytes that fused attention keeps of each softmax: on an NPU its greatest score and sum, 8 fp32 each."""
    logits_bytes: int | None = None
    """Of a chunk of logits; None: as on CPU and NPU."""
    bucket: float = REDUCE_BUCKET
    lazy_buffers: bool = False
    """Memory counts when it is written (CPU), not when it is reserved."""
    blockwise: bool = True
    """`training/deepspeed/zero_step.py` takes the optimizer step where the stage allows it, not DeepSpeed."""
    fixed: int = 0
    """What the process takes before any tensor: libraries, device context, communication buffers."""

    @property
    def steps_in_blocks(self) -> bool:
        """Gradients stay where autograd made them, and are cast to fp32 block after block."""
        return self.blockwise and self.zero_stage in (1, 2) and not self.offload

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        """Of a micro step on one device."""
        return self.batch_size * self.seq_length // self.sequence_parallel


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device. `host` is offloaded, on the host, for one device."""

    parameters: float
    optimizer: float
    gradients: float
    """From the reduction to the optimizer's step; with accumulation all the time."""
    buckets: float
    """Buffers of the reduction, during backward."""
    first_buckets: float
    """What they hold when backward begins: on a CPU what has been written, the output matrix's gradient."""
    activations: float
    working: float
    """What backward of one layer takes besides."""
    loss_gradients: float
    """Of hidden states and output matrix: made in the forward pass, used first in backward."""
    logits: float
    """One chunk of them, and the product that is added."""
    embedding_gradient: float
    step: float
    """Of the optimizer, temporary."""
    fixed: float
    building: float
    """When the model is built or read, before there is an optimizer."""
    snapshot: float
    """Copies in host memory while a checkpoint is written in the background, of one device."""
    host: float = 0.0
    accumulates: bool = False

    @property
    def phases(self) -> dict[str, float]:
        """What is held at each moment that may be the fullest."""
        always = self.parameters + self.optimizer + self.fixed + (self.gradients if self.accumulates else 0)
        new_gradients = 0 if self.accumulates else self.gradients
        acts = self.activations + self.loss_gradients
        return {
            "building": self.building + self.fixed,
            "loss": always + acts + self.logits,
            "start of backward": always + acts + self.working + self.first_buckets,
            "end of backward": always + new_gradients + self.buckets + self.embedding_gradient + self.working,
            "optimizer": always + new_gradients + self.step,
        }

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def fullest(self) -> str:
        """The moment of the peak."""
        return max(self.phases, key=self.phases.__getitem__)

    def rows(self) -> list[tuple[str, float]]:
        """Name and bytes of each part, for a table."""
        return [
            ("parameters", self.parameters),
            ("optimizer state", self.optimizer),
            ("gradients", self.gradients),
            ("reduction buffers", self.buckets),
            ("activations", self.activations),
            ("layer's backward", self.working),
            ("loss gradients", self.loss_gradients),
            ("logits chunk", self.logits),
            ("embedding grad.", self.embedding_gradient),
            ("optimizer step", self.step),
            ("fixed", self.fixed),
        ]


def estimate(model: ModelConfig, setup: TrainingSetup) -> Estimate:
    """Peak memory of one device, by part."""
    activations, working = _activations(model, setup)
    loss_gradients, logits = _loss(model, setup)
    return Estimate(
        **_states(model, setup),
        activations=activations,
        working=working,
        loss_gradients=loss_gradients,
        logits=logits,
        embedding_gradient=setup.dtype_bytes * model.vocab_size * model.dim,
        fixed=setup.fixed,
        accumulates=setup.gradient_accumulation_steps > 1,
    )


def _states(model: ModelConfig, setup: TrainingSetup) -> dict[str, float]:
    """Parameters, gradients and optimizer state under ZeRO (arXiv 1910.02054, figure 1)."""
    total, b, stage = model.parameter_count(), setup.dtype_bytes, setup.zero_stage
    share = total / setup.devices
    owned = share if stage >= 1 else total
    buckets = _bucket_elements(total, setup)
    # Averages over many micro steps are summed in fp32.
    gradients = (4 if setup.gradient_accumulation_steps > 1 else b) * (share if stage >= 2 else total)
    # fp32 master weights and Adam's two moments; DeepSpeed's own step casts all gradients to fp32 at once.
    optimizer, step, host = 12 * owned, 4 * owned, 0.0
    if setup.steps_in_blocks:
        step = 4 * min(owned, STEP_BLOCK_CPU if setup.lazy_buffers else STEP_BLOCK)
    if setup.offload and stage >= 2:
        host, optimizer, step, gradients = optimizer + step + gradients, 0.0, 0.0, 0.0
    # A device holds its share and the parameter whose turn it is.
    largest = model.dim * max(model.vocab_size, model.ffn_dim)
    second = total / setup.hpz if setup.hpz > 1 else 0.0
    return {
        "parameters": b * (share + second + min(total, LIVE_PARAMETERS) if stage == 3 else total),
        "building": b * (share + largest if stage == 3 else total),
        "snapshot": (12 + (b if stage == 3 else 0)) * owned,
        "gradients": gradients,
        "optimizer": optimizer,
        "buckets": b * buckets,
        "first_buckets": b
        * (_bucket_elements(model.vocab_size * model.dim, setup) if setup.lazy_buffers else buckets),
        "step": step,
        "host": host,
    }


def _bucket_elements(total: int, setup: TrainingSetup) -> float:
    """DeepSpeed fills a bucket while it sends another; ZeRO-3 sorts a bucket into a copy before sending.

    An accelerator holds the buffers whole; on a CPU only what has been written takes memory.
    """
    filled = min(setup.bucket, total)
    if setup.zero_stage == 0 or (setup.devices == 1 and setup.steps_in_blocks):  # nothing to reduce
        return 0.0
    if setup.zero_stage == 3:
        return 2 * filled if setup.lazy_buffers else setup.bucket + filled
    return filled * (2 if total > setup.bucket else 1) if setup.lazy_buffers else 2 * setup.bucket


def layer_parameters(model: ModelConfig) -> int:
    attention = model.dim * model.head_dim * 2 * (model.n_heads + model.kv_heads)
    return attention + 3 * model.dim * model.ffn_dim + 2 * model.dim


def layer_activations(model: ModelConfig, setup: TrainingSetup) -> float:
    """Bytes that one layer keeps for backward when it is not recomputed."""
    b, tokens, dim = setup.dtype_bytes, setup.tokens, model.dim
    q_dim, kv_dim = model.n_heads * model.head_dim, model.kv_heads * model.head_dim
    norms = 2 * (2 * b * dim + 4)  # two: input, output, and a scale in fp32
    attention = b * (q_dim + 2 * kv_dim) + b * q_dim + setup.statistics * model.n_heads
    feed_forward = (3 if setup.one_pass else 4) * b * model.ffn_dim
    attention += b * (sent_kv_dim(model, setup) - 2 * kv_dim)  # what attention keeps of keys and values
    kept = tokens * (norms + attention + feed_forward)
    if not setup.one_pass:  # cosines and sines of queries and keys
        kept += setup.seq_length // setup.sequence_parallel * 8 * model.head_dim
    return kept + _kept_scores(model, setup) / setup.sequence_parallel


def sent_kv_dim(model: ModelConfig, setup: TrainingSetup) -> int:
    """Width of keys and values together in attention: some more than once where ranks outnumber them."""
    return 2 * max(model.kv_heads, setup.sequence_parallel) * model.head_dim


def _kept_scores(model: ModelConfig, setup: TrainingSetup) -> float:
    """What attention by blocks or in plain form keeps: probabilities, a mask for all heads, fp32 copies."""
    if setup.attention == "fused":
        return 0.0
    triangle = setup.attention == "triangle"
    width: float = setup.seq_length
    if triangle:
        width = (setup.seq_length + min(TRIANGLE_BLOCK, setup.seq_length)) / 2
    # Softmax in fp32; the triangle of an NPU keeps it in the training dtype alone.
    narrow = triangle and not setup.lazy_buffers
    per_score = (setup.dtype_bytes if narrow else 4) * model.n_heads
    kept = setup.seq_length * width * (per_score * setup.batch_size + 1)
    if narrow:
        repeated = 2 * model.n_heads * model.head_dim if model.kv_heads < model.n_heads else 0
        return kept + setup.dtype_bytes * setup.tokens * repeated  # keys and values, for all heads
    if setup.dtype_bytes == 4:
        return kept
    q_dim = model.n_heads * model.head_dim
    return kept + 4 * setup.tokens * 3 * q_dim  # queries, keys and values, in fp32 for all heads


def _activations(model: ModelConfig, setup: TrainingSetup) -> tuple[float, float]:
    """What all layers keep, and the most that one layer takes besides while it is (re)computed."""
    b, tokens = setup.dtype_bytes, setup.tokens
    whole = layer_activations(model, setup)
    recomputed = min(setup.checkpointed_layers, model.n_layers)
    kept = recomputed * b * tokens * model.dim + (model.n_layers - recomputed) * whole
    kept += tokens * 3 * b * model.dim  # embedding, last norm
    # Backward holds the gradients of a layer's widest part beside what it reads.
    gradients = tokens * b * (3 * model.ffn_dim + 2 * model.dim)
    if setup.sequence_parallel > 1:  # one of q, k and v as it is sent, and as it comes
        gradients += 2 * tokens * b * model.n_heads * model.head_dim
    return kept, gradients + (whole if recomputed else 0)


def _loss(model: ModelConfig, setup: TrainingSetup) -> tuple[float, float]:
    """Gradients of hidden states and output matrix; a chunk of logits and the product that is added."""
    b, vocab, dim = setup.dtype_bytes, model.vocab_size, model.dim
    most = max(16, (setup.logits_bytes or LOGITS_BYTES[b]) // (vocab * b))
    chunks = -(-setup.tokens // most)
    chunk = -(-setup.tokens // chunks)
    in_fp32 = setup.precision == "fp16" or (setup.precision == "bf16" and chunks > MAX_ROUNDINGS)
    gradients = setup.tokens * dim * b + vocab * dim * (4 if in_fp32 else b)
    return gradients, chunk * vocab * b + (vocab * dim * b if in_fp32 else 0)


def bytes_sent(model: ModelConfig, setup: TrainingSetup) -> float:
    """Bytes that each device sends in one optimizer step (ZeRO, arXiv 1910.02054, section 7).

    With rings an all-reduce sends 2 P (N-1)/N elements, a reduce-scatter or an all-gather half of that.
    Stage 0: one all-reduce; 1: reduce-scatter and all-gather; 2: in every micro step an all-reduce, for
    DeepSpeed reduces buckets that several ranks own in that way (counted: docs/scaling.md), and one
    all-gather; 3: in every micro step two all-gathers and a reduce-scatter. With hierarchical partitioning
    (`hpz`) the second all-gather stays within a node, and is not counted here. Devices that share samples
    send queries, keys, values and attention's output among them, and back in backward (`sequence_parallel`).
    """
    once = model.parameter_count() * setup.dtype_bytes * (setup.devices - 1) / setup.devices
    micro_steps = setup.gradient_accumulation_steps
    return micro_steps * _sequence_bytes(model, setup) + (
        once
        * {0: 2, 1: 2, 2: 2 * micro_steps + 1, 3: (2 if setup.hpz > 1 else 3) * micro_steps}[setup.zero_stage]
    )


def _sequence_bytes(model: ModelConfig, setup: TrainingSetup) -> float:
    """Bytes that all-to-alls around attention send in a micro step: forward, backward, forward again."""
    leaving = (setup.sequence_parallel - 1) / setup.sequence_parallel
    width = 2 * model.n_heads * model.head_dim + sent_kv_dim(model, setup)
    passes = 2 * model.n_layers + min(setup.checkpointed_layers, model.n_layers)
    return passes * setup.dtype_bytes * setup.tokens * width * leaving


CPU_FIXED = 480 << 20
ACCELERATOR_FIXED = 1 << 30
"""Libraries of a CPU rank; context and communication buffers of an accelerator. Measured, assumed."""


def setup_of(
    config: EffectiveConfig,
    devices: int,
    device: str,
    kept: dict[str, int] | None = None,
    *,
    blockwise: bool = True,
) -> TrainingSetup:
    """The set-up that a run's configuration asks for.

    device: its type. kept: its backend's `KEPT`. blockwise: whether the blockwise optimizer step can run with
    the installed DeepSpeed (`training.deepspeed.patches.why_not_blockwise`); the configuration may forbid it.
    """
    run, model, on_cpu = config.run, config.model, device == "cpu"
    if run.ckpoint_layer is None:
        recomputed = model.checkpointed_layers
    else:
        recomputed = model.n_layers if run.ckpoint_layer == -1 else run.ckpoint_layer
    zero = config.deepspeed.get("zero_optimization", {})
    offload = zero.get("cpu_offload") or (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return TrainingSetup(
        devices=devices,
        batch_size=run.batch_size,
        seq_length=config.seq_length,
        precision="bf16" if run.precision == "auto" else run.precision,
        zero_stage=run.zero_stage,
        offload=bool(offload),
        sequence_parallel=run.sequence_parallel,
        hpz=int(zero.get("zero_hpz_partition_size", 1)) if run.zero_stage == 3 else 1,
        checkpointed_layers=min(recomputed, model.n_layers),
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        attention="fused" if run.attention == "auto" else run.attention,
        one_pass=bool((kept or {}).get("one_pass", on_cpu)),
        statistics=(kept or {}).get("statistics", 4),
        logits_bytes=(kept or {}).get("logits_bytes"),
        bucket=float(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
        lazy_buffers=on_cpu,
        blockwise=blockwise and run.zero_step != "deepspeed" and run.optimizer in ("auto", "torch"),
        fixed=CPU_FIXED if on_cpu else ACCELERATOR_FIXED,
    )
