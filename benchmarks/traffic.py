"""Bytes that a ZeRO-2 step sends, counted on local gloo ranks beside two formulas (docs/scaling.md).

    python benchmarks/traffic.py [--ranks 2] [--accumulation 1] [--exchange]

Counted is what DeepSpeed does, as on devices; with --exchange what ranks on CPUs do.

Every collective that a step calls is noted with the bytes of its tensors; what a ring sends for them is
2 (N-1)/N of an all-reduce's, (N-1)/N of a reduce's or reduce-scatter's, (N-1)/N of what an all-gather
gives. The last line is JSON: bytes a rank sends in a step, by count, by the formula of what DeepSpeed does
(all-reduce and all-gather) and by that of ZeRO's paper (reduce-scatter and all-gather).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CONFIG = {"dim": 128, "n_layers": 2, "n_heads": 2, "vocab_size": 4000, "max_seq_len": 32}


class Counter:
    """Stands before torch's collectives and notes the bytes of what each is given."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = defaultdict(float)

    def watch(self, dist) -> None:
        shares = {"all_reduce": 2, "reduce": 1, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}
        shares["all_to_all_single"] = 1
        for name, share in shares.items():
            self._watch(dist, name, share)

    def _watch(self, dist, name: str, share: int) -> None:
        original = getattr(dist, name)

        def noted(*arguments, **options):
            # Of a reduce-scatter the input, of an all-gather the output is the whole.
            tensors = [x for x in (*arguments, *options.values()) if hasattr(x, "nbytes")]
            ranks = dist.get_world_size()
            self.sent[name] += share * max(t.nbytes for t in tensors) * (ranks - 1) / ranks
            return original(*arguments, **options)

        setattr(dist, name, noted)


def rank(accumulation: int, exchange: bool) -> None:
    """One rank of the counted run; rank 0 prints."""
    import torch
    import torch.distributed as dist

    from aquila.backend import cpu
    from aquila.config import Device, load_run_config
    from aquila.model import AquilaModel
    from aquila.training.deepspeed import zero_step
    from aquila.training.deepspeed.config import parameter_groups
    from aquila.training.deepspeed.engine import Engine
    from aquila.training.deepspeed.processes import processes

    if not exchange:
        zero_step.can_exchange = lambda zero: False
    with tempfile.TemporaryDirectory() as temporary, processes("gloo", torch.device("cpu")) as (me, ranks):
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "run.yaml").write_text(
            f"batch_size: 1\nprecision: bf16\ngradient_accumulation_steps: {accumulation}\n"
        )
        device = Device("cpu", cpu.supported_precisions())
        effective = load_run_config(folder / "run.yaml", str(folder), [], device=device, root=ROOT)
        model = AquilaModel(effective.model, dtype=torch.bfloat16)
        optimizer = cpu.optimizer("auto", parameter_groups(model, 0.1), 1e-4, (0.9, 0.95), 1e-8, 0.1)
        engine = Engine(model, optimizer, effective, ranks)
        tokens = torch.randint(0, CONFIG["vocab_size"], (1, CONFIG["max_seq_len"]))
        batch = SimpleNamespace(tokens=tokens, labels=tokens, loss_mask=torch.ones(1, 32), documents=None)
        engine.train_step([batch] * accumulation, 1e-4)
        counter = Counter()
        counter.watch(dist)
        engine.train_step([batch] * accumulation, 1e-4)
        if me == 0:
            print("@" + json.dumps({"parameters": effective.model.parameter_count(), **counter.sent}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--accumulation", type=int, default=1, help="micro steps; default: %(default)s")
    parser.add_argument("--exchange", action="store_true", help="the way of ranks on CPUs")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options.accumulation, options.exchange)
        return
    from aquila.config import ModelConfig
    from aquila.planning.memory import TrainingSetup, bytes_sent

    words = ["-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks), __file__, "--rank"]
    words += ["--accumulation", str(options.accumulation), *(["--exchange"] if options.exchange else [])]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = [line[line.index("@") + 1 :] for line in done.stdout.splitlines() if "@{" in line]
    if done.returncode or not found:
        raise SystemExit(done.stderr[-3000:])
    counted = json.loads(found[0])
    counted.pop("parameters")
    model = ModelConfig(**CONFIG)
    setup = TrainingSetup(options.ranks, 1, 32, gradient_accumulation_steps=options.accumulation)
    # To each owner its part of the gradients, from each owner its part of the weights.
    formula = bytes_sent(model, replace(setup, zero_stage=1) if options.exchange else setup)
    for name, value in counted.items():
        print(f"{name:24} {value / 1e6:9.3f} MB a rank")
    total = sum(counted.values())
    print(f"counted {total / 1e6:.3f} MB, formula {formula / 1e6:.3f} MB")
    facts = {"ranks": options.ranks, "counted": total, "formula": formula, **counted}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
