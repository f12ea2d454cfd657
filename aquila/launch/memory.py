"""How much memory a device needs to train a model, and how much it sends: from shapes alone, no torch.

Symbols: P parameters, N devices, T = batch_size x sequence tokens of a micro step, b bytes of the
training dtype. Sources: ZeRO (arXiv 1910.02054, section 3 and 7.2) for states and traffic; the list of
saved activations is that of `model/aquila.py`, counted with autograd's saved-tensor hooks and tested
against them; the whole is tested against measured peaks.
"""

from dataclasses import dataclass, replace

from aquila.config import ModelConfig, RunConfig

GIB = 2**30
CHUNK_BYTES = 200 << 20
MAX_ROUNDINGS = 4
"""As in `model/loss.py`: the size of a chunk of logits, and when its weight gradient is summed in fp32."""
TRIANGLE_BLOCK = 512
REDUCE_BUCKET = 5e8
"""DeepSpeed's default `reduce_bucket_size`, in elements."""
LIVE_PARAMETERS = 1e9
"""DeepSpeed's default `stage3_max_live_parameters`: ZeRO-3 gathers up to this many at a time."""


@dataclass(frozen=True)
class Setup:
    """What the memory of one device depends on, besides the model."""

    devices: int
    batch_size: int
    seq_length: int
    precision: str = "bf16"
    zero_stage: int = 2
    offload: bool = False
    checkpointed_layers: int = 0
    gradient_accumulation_steps: int = 1
    attention: str = "fused"
    fused_norms: bool = True
    """The norm keeps its input in the training dtype (accelerators), not a copy in fp32 (CPU)."""
    bucket: float = REDUCE_BUCKET
    fixed: int = 0
    """What the process takes before any tensor: libraries, device context, communication buffers."""

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_length


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device. `host` is offloaded, on the host, for one device."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    buckets: float
    working: float
    step: float
    """Temporary, while the optimizer steps and the activations are gone."""
    fixed: float
    host: float = 0.0

    @property
    def peak(self) -> float:
        """The larger of the two high waters: the end of the forward pass, the optimizer's step."""
        states = self.parameters + self.gradients + self.optimizer + self.buckets + self.fixed
        return states + max(self.activations + self.loss + self.working, self.step)

    def rows(self) -> list[tuple[str, float]]:
        """Name and bytes of each part, for a table."""
        return [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("buckets of reduction", self.buckets),
            ("activations", self.activations),
            ("one layer's working set", self.working),
            ("loss chunk", self.loss),
            ("optimizer step (activations gone)", self.step),
            ("fixed", self.fixed),
        ]


def estimate(model: ModelConfig, setup: Setup) -> Estimate:
    """Peak memory of one device."""
    states = _states(model, setup)
    activations, working = _activations(model, setup)
    return Estimate(
        **states, activations=activations, working=working, loss=_loss(model, setup), fixed=setup.fixed
    )


def _states(model: ModelConfig, setup: Setup) -> dict[str, float]:
    """Parameters, gradients and optimizer state under ZeRO (arXiv 1910.02054, figure 1)."""
    total, b, n, stage = model.parameter_count(), setup.dtype_bytes, setup.devices, setup.zero_stage
    share = total / n
    accumulated = 4 if setup.gradient_accumulation_steps > 1 else b
    parameters = b * total
    if stage == 3:
        largest = max(model.vocab_size * model.dim, layer_parameters(model))
        parameters = b * share + b * min(total, max(2 * largest, min(LIVE_PARAMETERS, total)))
    gradients = accumulated * (share if stage >= 2 else total)
    # fp32 master weights and Adam's two moments
    optimizer = 12 * (share if stage >= 1 else total)
    step = 4 * (share if stage >= 1 else total)
    buckets = b * min(setup.bucket, total) * 2 if stage in (1, 2) else 0.0
    host = 0.0
    if setup.offload and stage >= 2:
        host, optimizer, step = optimizer + gradients + step, 0.0, 0.0
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer": optimizer,
        "buckets": buckets,
        "step": step,
        "host": host,
    }


def layer_parameters(model: ModelConfig) -> int:
    attention = model.dim * model.head_dim * 2 * (model.n_heads + model.kv_heads)
    return attention + 3 * model.dim * model.ffn_dim + 2 * model.dim


def layer_activations(model: ModelConfig, setup: Setup) -> float:
    """Bytes that one layer keeps for backward when it is not recomputed."""
    b, tokens, dim = setup.dtype_bytes, setup.tokens, model.dim
    kv_dim = model.kv_heads * model.head_dim
    # Two norms: input and output; unfused also the fp32 input and the scaled one.
    norms = 2 * ((2 * b * dim if setup.fused_norms else 4 * dim + 2 * b * dim) + 4)
    attention = b * (dim + 2 * kv_dim) + b * dim + 4 * model.n_heads
    feed_forward = 4 * b * model.ffn_dim
    kept = tokens * (norms + attention + feed_forward)
    kept += setup.seq_length * 8 * model.head_dim  # cosines and sines of queries and keys
    if setup.attention != "fused":
        width = setup.seq_length
        if setup.attention == "triangle":
            width = (setup.seq_length + min(TRIANGLE_BLOCK, setup.seq_length)) / 2
        kept += 2 * b * setup.batch_size * model.n_heads * setup.seq_length * width
    return kept


def _activations(model: ModelConfig, setup: Setup) -> tuple[float, float]:
    """What all layers keep, and the most that one layer takes besides while it is (re)computed."""
    b, tokens = setup.dtype_bytes, setup.tokens
    whole = layer_activations(model, setup)
    recomputed = min(setup.checkpointed_layers, model.n_layers)
    kept = recomputed * b * tokens * model.dim + (model.n_layers - recomputed) * whole
    kept += tokens * ((4 if not setup.fused_norms else 0) + 3 * b) * model.dim  # embedding, last norm
    # Backward holds the gradients of a layer's widest part beside what it reads.
    gradients = tokens * b * (2 * model.ffn_dim + 2 * model.dim)
    return kept, gradients + (whole if recomputed else 0)


def _loss(model: ModelConfig, setup: Setup) -> float:
    """Gradients of hidden states and output matrix, a chunk of logits, the product added (model/loss.py)."""
    b, vocab, dim = setup.dtype_bytes, model.vocab_size, model.dim
    most = max(16, CHUNK_BYTES // (vocab * b))
    chunks = -(-setup.tokens // most)
    chunk = -(-setup.tokens // chunks)
    in_fp32 = b == 2 and (setup.precision == "fp16" or chunks > MAX_ROUNDINGS)
    weight = vocab * dim * (4 + b if in_fp32 else b)
    return setup.tokens * dim * b + weight + chunk * vocab * b


def bytes_sent(model: ModelConfig, setup: Setup) -> float:
    """Bytes that each device sends in one optimizer step (ZeRO, arXiv 1910.02054, section 7).

    With rings an all-reduce sends 2 P (N-1)/N elements, a reduce-scatter or an all-gather half of that.
    Stage 0: one all-reduce; 1: reduce-scatter and all-gather; 2: the same with a reduce-scatter in every
    micro step; 3: in every micro step two all-gathers and a reduce-scatter.
    """
    once = model.parameter_count() * setup.dtype_bytes * (setup.devices - 1) / setup.devices
    micro_steps = setup.gradient_accumulation_steps
    return once * {0: 2, 1: 2, 2: micro_steps + 1, 3: 3 * micro_steps}[setup.zero_stage]


def setup_of(run: RunConfig, model: ModelConfig, devices: int, seq_length: int, **more: object) -> Setup:
    """The set-up that a run's configuration asks for."""
    if run.ckpoint_layer is None:
        recomputed = model.checkpointed_layers
    else:
        recomputed = model.n_layers if run.ckpoint_layer == -1 else run.ckpoint_layer
    return replace(
        Setup(
            devices=devices,
            batch_size=run.batch_size,
            seq_length=seq_length,
            precision="bf16" if run.precision == "auto" else run.precision,
            zero_stage=run.zero_stage,
            checkpointed_layers=min(recomputed, model.n_layers),
            gradient_accumulation_steps=run.gradient_accumulation_steps,
        ),
        **more,
    )
