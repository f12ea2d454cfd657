"""How long an optimizer step takes: arithmetic over what a device can do, with every assumption named.

A step is products on the matrix units, passes over memory, the optimizer and what is sent. Kernels that wait
for the host, the input and saves are not in it. The shares are fitted to published rows of training on
Ascend 910B3 (see `tests/unit/planning/test_speed.py`), none of them measured by this project.
"""

from dataclasses import dataclass

from aquila.config import ModelConfig
from aquila.planning.memory import TRIANGLE_BLOCK, TrainingSetup, bytes_sent, layer_parameters


@dataclass(frozen=True)
class Chip:
    """Rates of one device, by its data sheet or what is published of it."""

    flops: float
    """Dense peak in the training dtype, FLOP/s."""
    memory: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s that a device sends to the others of its node."""


MATRIX_SHARE = 0.62
"""Of the peak, reached by a layer's products."""
SCORES_SHARE = 0.35
"""The same for attention: fused, or in blocks."""
MEMORY_SHARE = 0.6
"""Of the memory's rate, reached by passes over activations."""
LINK_SHARE = 0.6
"""Of the links' rate, reached by large collectives."""
HIDDEN = 0.5
"""Of backward's computing: as much of the sending hides behind it with `overlap_comm`."""
LAYER_PASSES, LAYER_FORWARD = 114, 0.4
"""Tokens x dim numbers read or written by a layer besides products and scores, counted on the simulated NPU
(`benchmarks/npu_launches.py`); the share of forward."""
SCORE_PASSES, FP16_PASSES = 17, 6
"""The same of each score that attention in blocks writes; more in fp16, whose scores are clamped."""
LOGIT_BYTES, STEP_BYTES = 36, 30
"""Bytes moved for a logit of the loss, and for a parameter in the optimizer's step."""

CHIPS = {
    "910B3": Chip(313e12, 1.6e12, 196e9),
    "910B1": Chip(400e12, 1.6e12, 196e9),
    "910B2": Chip(376e12, 1.6e12, 196e9),
    "910B4": Chip(280e12, 0.8e12, 196e9),
    "A100": Chip(312e12, 2.0e12, 300e9),
    "H100": Chip(989e12, 3.35e12, 450e9),
    "H200": Chip(989e12, 4.8e12, 450e9),
}
"""Peaks as `backend` has them; memory and links: 910B of seven 28 GB/s links, GPUs by their data sheets."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every device, by part; `exchange` is what nothing hides."""

    products: float
    scores: float
    passes: float
    loss: float
    optimizer: float
    exchange: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_time(
    model: ModelConfig, setup: TrainingSetup, chip: Chip, *, link: float | None = None, overlap: bool = False
) -> StepTime:
    """Predicted time of an optimizer step. `link`: bytes/s of the slowest link, if not within one node."""
    micro, tokens, b = setup.gradient_accumulation_steps, setup.tokens, setup.dtype_bytes
    layers, again = model.n_layers, min(setup.checkpointed_layers, model.n_layers)
    triangle = setup.attention != "fused"
    width = (
        (setup.seq_length + min(TRIANGLE_BLOCK, setup.seq_length)) / 2 if triangle else setup.seq_length / 2
    )

    matrices = 6 * layers * layer_parameters(model) + 6 * model.vocab_size * model.dim
    repeated = 2 * again * layer_parameters(model)
    products = tokens * (matrices + repeated) / (chip.flops * MATRIX_SHARE)
    one_layer_scores = (
        4 * width * model.n_heads * model.head_dim * (3 if triangle else 3.5)
    )  # a fused backward makes them again
    scores = tokens * one_layer_scores * (layers + again / 3) / (chip.flops * SCORES_SHARE)

    per_score = SCORE_PASSES + (FP16_PASSES if setup.precision == "fp16" else 0)
    numbers = LAYER_PASSES * model.dim + (per_score * model.n_heads * width if triangle else 0)
    bandwidth = chip.memory * MEMORY_SHARE
    passes = tokens * b * numbers * (layers + again * LAYER_FORWARD) / bandwidth
    loss = tokens * model.vocab_size * LOGIT_BYTES / bandwidth
    owned = model.parameter_count() / (setup.devices if setup.zero_stage >= 1 else 1)

    sending = bytes_sent(model, setup) / ((link or chip.link) * LINK_SHARE)
    hidden = HIDDEN * micro * (products + scores + passes) * 2 / 3 if overlap else 0.0
    return StepTime(
        products=micro * products,
        scores=micro * scores,
        passes=micro * passes,
        loss=micro * loss,
        optimizer=owned * STEP_BYTES / bandwidth,
        exchange=max(sending - hidden, sending / 3 if setup.zero_stage < 3 else 0.0),
    )
