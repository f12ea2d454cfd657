"""A model on 4 gloo ranks whose samples 1, 2 and 4 of them share, without DeepSpeed.
`python sequence_parallel_ranks.py NAME...` from the project's folder.

Prints `CASE {...}` for each: the loss, and the greatest difference of any gradient from that of one process
that goes through all samples by itself, relative to the greatest gradient.
"""

# ruff: noqa: E402
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [os.getcwd(), str(Path(__file__).parent)]
import forked_ranks
import torch
import torch.distributed as dist

from aquila.config import ModelConfig
from aquila.model import AquilaModel
from aquila.training.deepspeed.ranks import share_samples

RANKS, SAMPLES, LENGTH = 4, 4, 32
CASES = [
    {"name": "documents"},
    {"name": "one key head, all layers again", "n_kv_heads": 1, "ckpoint_layer": -1},
    {"name": "selective", "n_kv_heads": 4, "ckpoint_layer": -1, "recompute": "selective"},
    {"name": "triangle", "attention": "triangle"},
    {"name": "no documents", "plain": True},
    {"name": "scaled angles", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0,
     "original_max_position_embeddings": 8}},
    {"name": "compiled", "compile": True},
]  # fmt: skip
"""Of each `n_kv_heads` of `small` is 2: two ranks then share a head of keys and values at N = 4."""


def make_model(case: dict) -> AquilaModel:
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=case.get("n_kv_heads", 2), multiple_of=16, vocab_size=97,
        max_seq_len=LENGTH, checkpoint_activations=True, ckpoint_layer=case.get("ckpoint_layer", 1),
        rope_scaling=case.get("rope_scaling"), initializer_range=0.2,
    )  # fmt: skip
    options = {"attention": case.get("attention", "auto"), "recompute": case.get("recompute", "full")}
    model = AquilaModel(config, **options, z_loss=1e-3, seed=3)
    if case.get("compile"):
        model.compile_blocks()
    return model


def make_samples(case: dict) -> dict[str, torch.Tensor | None]:
    """(SAMPLES, LENGTH): documents that begin within ranks, counted tokens that some ranks have none of."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 97, (SAMPLES, LENGTH + 1), generator=generator)
    starts = torch.rand(SAMPLES, LENGTH, generator=generator) < 0.15
    mask = (torch.rand(SAMPLES, LENGTH, generator=generator) < 0.7).float()
    mask[0, : LENGTH // 2] = 0
    documents = None if case.get("plain") else starts.cumsum(1)
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "documents": documents}


def loss_and_gradients(model: AquilaModel, samples: dict, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """One micro step a sample, and their mean: the loss, and the gradients as one tensor."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        given = {key: None if x is None else x[row : row + 1] for key, x in samples.items()}
        loss = model(**given) / len(rows)
        loss.backward()
        total += loss.detach()
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def run_rank(case: dict, rank: int, port: int) -> int:
    where = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=RANKS)
    samples = make_samples(case)
    whole_loss, whole = loss_and_gradients(make_model(case), samples, range(SAMPLES))
    apart = []
    for size in (1, 2, 4):
        model = make_model(case)
        if size > 1:
            model.divide_sequence(share_samples(size, 60))
        replicas = RANKS // size
        rows = range(rank // size, SAMPLES, replicas)
        loss, gradients = loss_and_gradients(model, samples, rows)
        for value in (loss, gradients):  # as ZeRO does
            dist.all_reduce(value)
            value /= RANKS
        apart.append(
            [float(abs(loss - whole_loss)), float((gradients - whole).abs().max() / whole.abs().max())]
        )
    if rank == 0:
        print(
            f"CASE {json.dumps({'name': case['name'], 'loss': float(whole_loss), 'apart': apart})}",
            flush=True,
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    forked_ranks.run_rank = run_rank
    for case in (case for case in CASES if case["name"] in sys.argv[1:]):
        statuses = forked_ranks.run({"ranks": RANKS, **case})
        assert not any(statuses), (case, statuses)
