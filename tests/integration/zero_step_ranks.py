"""Six steps with DeepSpeed's optimizer step and with the blockwise one, from the same weights on the same
samples, on ranks forked from one process. `python zero_step_ranks.py CASES.json` from a project's folder.

A case is {"ranks", "overrides", "way"}: way "plain" compares the two as they are; "buckets" lets two ranks
reduce their gradients through DeepSpeed's buckets, as devices do; "same norm" gives the blockwise step
DeepSpeed's norm; "new scale" lets it divide by the loss scale that the step itself has raised; "autograd"
compares with torch alone, each rank going through all ranks' samples. Prints a line `CASE {...}` for each:
after each step the largest relative difference of master weights, and whether all weights are equal.
"""

# ruff: noqa: E402
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [os.getcwd(), str(Path(__file__).parent)]
import forked_ranks

forked_ranks.imports()
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from aquila.backend import get_backend
from aquila.config import Device, EffectiveConfig, load_run_config
from aquila.pretrain import build_model
from aquila.training.deepspeed import zero_step
from aquila.training.deepspeed.config import parameter_groups
from aquila.training.deepspeed.engine import Engine
from aquila.training.deepspeed.processes import processes

STEPS = 6


def change_step(case: dict) -> None:
    """Changes the blockwise step as the case asks; each process runs one case."""
    step = zero_step.BlockwiseStep
    if case["way"] != "plain":
        zero_step.can_exchange = lambda zero: False
    if case["way"] == "same norm":
        step._norm = lambda self: self.zero.scaled_global_norm()
    if case["way"] == "new scale":
        factor = step._factor
        step._factor = lambda self, norm, scale: factor(self, norm, self.zero.loss_scale)


def batches(step: int, rank: int, count: int, effective) -> list[SimpleNamespace]:
    made = []
    for micro in range(count):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + micro)
        shape = (effective.run.batch_size, effective.seq_length + 1)
        ids = torch.randint(1, effective.model.vocab_size, shape, generator=generator)
        mask = torch.ones(shape[0], shape[1] - 1)
        made.append(SimpleNamespace(tokens=ids[:, :-1], labels=ids[:, 1:], loss_mask=mask, documents=None))
    return made


def build(overrides: list[str]) -> tuple[EffectiveConfig, torch.nn.Module, torch.optim.Optimizer]:
    device = Device("cpu", ("fp32", "bf16", "fp16"), None, False)
    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed does not offer it on CPUs, torch does
    effective = load_run_config("run.yaml", "small", overrides, device=device)
    run, backend = effective.run, get_backend("cpu")
    model = build_model(effective, backend, torch.device("cpu"), None)
    groups = parameter_groups(model, run.weight_decay)
    optimizer = backend.optimizer(run.optimizer, groups, run.lr, run.betas, run.eps, run.weight_decay)
    return effective, model, optimizer


def train(case: dict, kind: str, rank: int) -> list[dict]:
    effective, model, optimizer = build([*case["overrides"], f"zero_step={kind}"])
    run, found = effective.run, []
    engine = Engine(model, optimizer, effective, case["ranks"])
    assert engine.zero_step.startswith(f"optimizer step: {kind}"), engine.zero_step
    for step in range(STEPS):
        result = engine.train_step(batches(step, rank, run.gradient_accumulation_steps, effective), run.lr)
        state = state_of(model, engine._engine.optimizer.single_partition_of_fp32_groups)
        found.append(state | {"norm": float(result.grad_norm), "scale": result.loss_scale})
    return found


def train_by_torch(case: dict) -> list[dict]:
    """The same steps without DeepSpeed: autograd, torch's clipping and AdamW."""
    effective, model, optimizer = build([*case["overrides"], "zero_step=deepspeed"])
    run, found = effective.run, []
    optimizer = torch.optim.AdamW(
        optimizer.param_groups, lr=run.lr, betas=run.betas, eps=run.eps, fused=False
    )
    for step in range(STEPS):
        for rank in range(case["ranks"]):
            given = batches(step, rank, run.gradient_accumulation_steps, effective)
            for batch in given:
                loss = model(batch.tokens, labels=batch.labels, loss_mask=batch.loss_mask)
                (loss / len(given) / case["ranks"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        found.append(state_of(model, list(model.parameters())) | {"norm": float(norm)})
    return found


def state_of(model: torch.nn.Module, masters: list[torch.Tensor]) -> dict:
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"weights": weights, "masters": torch.cat([p.detach().flatten() for p in masters])}


def compare(case: dict, rank: int) -> dict:
    change_step(case)
    ours = train(case, "blockwise", rank)
    by_torch = case["way"] == "autograd"
    theirs = train_by_torch(case) if by_torch else train(case, "deepspeed", rank)
    rows = {"difference": [], "equal": [], "norms": [], "scales": [step.get("scale") for step in ours]}
    compared = "weights" if by_torch else "masters"  # a rank has its share of master weights alone
    for a, b in zip(ours, theirs, strict=True):
        apart = (a[compared] - b[compared]).abs().max() / b[compared].abs().max()
        rows["difference"].append(float(apart))
        rows["equal"].append(
            torch.equal(a["weights"], b["weights"]) and torch.equal(a[compared], b[compared])
        )
        rows["norms"].append([a["norm"], b["norm"]])
    rows["moved"] = float((theirs[-1]["weights"] - theirs[0]["weights"]).abs().max())
    return rows


def run_rank(case: dict, rank: int, port: int) -> int:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(case["ranks"]), LOCAL_RANK=str(rank), MASTER_ADDR="localhost",
        MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    with processes("gloo", torch.device("cpu"), 60):
        rows = compare(case, rank)
        everyone = [None] * case["ranks"]
        dist.all_gather_object(everyone, rows)
        if rank == 0:
            for key in ("difference", "equal"):
                worst = max if key == "difference" else min
                rows[key] = [worst(values) for values in zip(*(r[key] for r in everyone), strict=True)]
            print(f"CASE {json.dumps(rows)}", flush=True)
    return 0


if __name__ == "__main__":
    forked_ranks.run_rank = run_rank
    for case in json.loads(Path(sys.argv[1]).read_text()):
        statuses = forked_ranks.run(case)
        if any(statuses):
            print(f"CASE {json.dumps({'statuses': statuses})}", flush=True)
