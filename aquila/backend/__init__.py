"""The devices: the only place with device names, and one module a device behind one signature.

`reference` is the definition, in plain torch; `cpu`, `cuda` and `npu` equal it with the best that their
device has. Every module offers:

- `embedding(tokens, weight)`, `attention(q, k, v, *, kind, documents, start, block)`,
  `rms_norm(x, weight, eps)`, `rotary(x, cos, sin)`, `swiglu(gate, up)`, `swiglu_halves(gate_up)`,
  `linear(x, weight)`,
  `cross_entropy_(logits, labels, scale, z_loss, gradient)`,
  `whole_cross_entropy(hidden, weight, labels, scale, z_loss, wanted)`;
- `step_linear(x, weight, scale)`, the product of few rows, and `prepare_weight(weight)`;
  `prepare_generation()`, once in a process that generates;
  `step_attention(qkv, kv, rows)`, its attention over the cache; `prepare_layers(layers)`, all layers of a
  step as one kernel, or None;
- `know_documents(here, there)`, when a batch's documents have been copied to the device;
- `attention_kind(asked)` resolves "auto"; `SAVED_IN_SELECTIVE` names the operators whose results
  selective recomputation keeps; `COMPILE_BLOCKS` says whether compiling each block pays by measurement,
  `OVERLAP_COMM` whether gradients are reduced during backward by default,
  `ZERO_KERNELS` whether DeepSpeed has kernels of its own here,
  `TAKES_PARTS` whether operators take a part of a tensor's last dimension without a copy of it,
  `KEPT` how operators keep activations (fields of `planning.memory.Setup`),
  `DETERMINISTIC` the variables of `make_deterministic()`, after which results are the same bit for bit,
  `ENVIRONMENT_DEFAULTS` what `set_device` sets in the environment where the user has not;
- `fp8_support()` says how linear layers in float8 run ("native", "emulated"), or why they cannot;
  `convert_to_fp8(layers, recipe)` makes them so;
- `optimizer(kind, params, lr, betas, eps, weight_decay)`, `optimizer_kind(asked)`, `OPTIMIZERS`;
- `COMMUNICATION`, `device_count()`, `set_device(local_rank)`, `device_name()`, `supported_precisions()`,
  `placement()` (where the rank's threads run, for people),
  `allocate_compactly()` for ZeRO-3, `memory_gib()` (peak), `peak_flops(dtype)`, `synchronize()`,
  `kernels()` (what runs here, for people);
  `profiling(stem)`, a profiler over a block, which writes its files beside `stem` at its end.

Legend of shapes: B batch, S query positions, T key positions (T = start + S), H query heads, K key and
value heads (H a multiple of K), D head size, N tokens of a chunk, V vocabulary.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aquila.backend.devices import ATTENTION_KINDS, DEVICE_TYPES, detect, get_backend

__all__ = ["ATTENTION_KINDS", "DEVICE_TYPES", "detect", "get_backend"]


def __getattr__(name: str) -> Any:
    """The names of `devices` at their first use: it imports torch, which not every command needs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from aquila.backend import devices

    globals().update({known: getattr(devices, known) for known in __all__})
    return globals()[name]
