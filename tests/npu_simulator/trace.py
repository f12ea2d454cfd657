"""A training step of the whole model on `npu:0` in shapes alone, through torch_npu's own operators.

Run by `test_npu_wheel.py` alone: `python trace.py "ATTENTION RECOMPUTE DTYPE [packed]" ...`.
Prints one JSON line: for each, the torch_npu operators that ran and what is wrong with the gradients, if
anything.
"""

import json
import sys

import torch
import torch_npu  # noqa: F401, makes the device and its operators known
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from aquila.backend import npu
from aquila.config import ModelConfig
from aquila.model import AquilaModel

ROWS, LENGTH = 2, 1000
ENDS = [300, 1000, 1700, 2000]  # of the packed documents, in both rows laid end to end


class Operators(TorchDispatchMode):
    """Notes the torch_npu operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "npu":
            self.names.add(operator._schema.name.removeprefix("npu::"))
        return operator(*args, **(kwargs or {}))


def trace(attention: str, recompute: str, dtype: str, packed: bool) -> dict[str, list[str]]:
    config = ModelConfig(
        dim=256,
        n_layers=3,
        n_heads=8,
        n_kv_heads=4,
        vocab_size=3000,
        multiple_of=32,
        max_seq_len=1024,
        checkpoint_activations=recompute != "none",
        ckpoint_layer=2,
    )
    mode = "full" if recompute == "none" else recompute
    wrong, operators = [], Operators()
    for made_once in (npu._compressed_mask, npu._future):
        made_once.cache_clear()  # those of another mode of fake tensors
    with FakeTensorMode():
        model = AquilaModel(
            config, attention=attention, recompute=mode, device="npu:0", dtype=getattr(torch, dtype)
        )
        tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device="npu:0")
        documents = torch.zeros_like(tokens) if packed else None
        if packed:  # the kernel's list is asked of the tensor's values, which a fake one lacks
            npu._ENDS.put(documents, ENDS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=False, foreach=False)
        with operators:
            loss = model(tokens, labels=tokens, documents=documents)
            loss.backward()
            optimizer.step()
        if loss.device.type != "npu" or loss.shape != () or loss.dtype != torch.float32:
            wrong.append(f"loss {loss}")
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            if gradient is None or gradient.shape != parameter.shape or gradient.device.type != "npu":
                wrong.append(name)
    return {"operators": sorted(operators.names), "wrong": wrong}


if __name__ == "__main__":
    reports = {}
    for case in sys.argv[1:]:
        attention, recompute, dtype, *packed = case.split()
        reports[case] = trace(attention, recompute, dtype, bool(packed))
    print(json.dumps(reports))
