"""Protects: acceptance fails where a device is at fault. Faults are planted in a copy of cpu.py."""

from types import SimpleNamespace

import pytest
import torch

from aquila.acceptance.operators import check_attention, check_operators
from aquila.acceptance.optimizer import check_optimizer
from aquila.acceptance.table import FAIL, PASS, SKIP, Measured, Skip, Table
from aquila.backend import cpu

CPU = torch.device("cpu")
FP32 = [torch.float32]


def planted(**faults: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(cpu), **faults})


def quiet() -> Table:
    return Table(show=lambda line: None)


def states(table: Table) -> dict[str, str]:
    return {result.name: result.state for result in table.results}


def sees_the_future(q, k, v, *, documents=None, **rest):
    """The query at 300 sees the key at 300 + 1: a mask off by one."""
    k, v = k.roll(-1, 1), v.roll(-1, 1)
    return cpu.attention(q, k, v, documents=documents, **rest)


def sees_all_documents(q, k, v, *, documents=None, **rest):
    return cpu.attention(q, k, v, **rest)


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (None, ()),
        (sees_the_future, ("fused float32", "fused float32: the future", "triangle float32: the future")),
        (sees_all_documents, ("fused float32, documents", "triangle float32: neighbours")),
    ],
)
def test_a_wrong_mask(fault, failing) -> None:
    table = quiet()
    check_attention(table, planted(attention=fault) if fault else cpu, CPU, FP32)
    found = states(table)
    assert set(failing) <= {name for name, state in found.items() if state == FAIL}
    assert bool(failing) or FAIL not in found.values()


class Stale(torch.optim.AdamW):
    """Keeps the gradients of its first step, as optimizers over flat buffers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                first = self.__dict__.setdefault("first", {}).setdefault(p, p.grad)
                p.grad = first.clone()
        return super().step(closure)


def test_a_stale_gradient() -> None:
    def stale(kind, params, lr, betas, eps, weight_decay):
        return Stale(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    table = quiet()
    check_optimizer(table, planted(optimizer=stale, OPTIMIZERS=("torch",)), CPU)
    assert states(table)["torch"] == FAIL
    table = quiet()
    check_optimizer(table, cpu, CPU)
    assert states(table)["torch"] == PASS


def test_an_operator_that_rounds_too_much() -> None:
    def coarse(x, weight, eps):
        return cpu.rms_norm(x, weight, eps).bfloat16().to(x.dtype)

    table = quiet()
    check_operators(table, planted(rms_norm=coarse), CPU, FP32)
    assert states(table)["rms_norm float32"] == FAIL
    assert states(table)["swiglu float32"] == PASS


def test_dependents_are_skipped_and_the_rest_goes_on() -> None:
    table = quiet()

    def broken() -> Measured:
        raise RuntimeError("no device")

    def absent() -> Measured:
        raise Skip("one device here")

    table.check("operators", "a", broken)
    table.check("generation", "b", lambda: Measured(0, 0), needs=("operators",))
    table.check("collectives", "c", absent)
    table.check("speed", "d", lambda: Measured(3.5, unit="GB/s"))
    assert [r.state for r in table.results] == [FAIL, SKIP, SKIP, PASS]
    assert "needs operators, which failed" in table.results[1].line()
    said = table.paragraph({"device": "1 x thing"})
    assert "1 checks passed, 1 failed, 2 were skipped. Failed: operators: a. d 3.5 GB/s." in said
