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
  `step_attention(qkv, kv, rows)`, its attention over the cache;
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
  `allocate_compactly()` for ZeRO-3, `memory_gib()` (peak), `peak_flops(dtype)`, `synchronize()`,
  `kernels()` (what runs here, for people);
  `profiling(stem)`, a profiler over a block, which writes its files beside `stem` at its end.

Legend of shapes: B batch, S query positions, T key positions (T = start + S), H query heads, K key and
value heads (H a multiple of K), D head size, N tokens of a chunk, V vocabulary.
"""

from types import ModuleType

import torch

from aquila.backend import cpu, cuda, npu, reference
from aquila.backend.reference import ATTENTION_KINDS

__all__ = ["ATTENTION_KINDS", "DEVICE_TYPES", "detect", "get_backend"]

# Importing a backend touches no device. "meta" tensors hold shapes alone: the definition gives them.
_BACKENDS = {"reference": reference, "cpu": cpu, "cuda": cuda, "npu": npu, "meta": reference}

DEVICE_TYPES = ("cpu", "cuda", "npu")


def get_backend(device_type: str) -> ModuleType:
    """The module of a device type (`torch.device.type`, or "reference").

    Raises `ValueError` for a device that has no backend here.
    """
    if device_type not in _BACKENDS:
        raise ValueError(f"no backend for device '{device_type}'; there are: {', '.join(_BACKENDS)}")
    return _BACKENDS[device_type]


def detect() -> str:
    """The best device type that this machine really has: "cuda", "npu" or "cpu".

    The NPU is asked first: TORCH_TRANSFER_TO_NPU=1 makes torch_npu answer in CUDA's name.
    """
    if npu.device_count():
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"
