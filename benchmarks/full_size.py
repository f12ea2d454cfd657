"""Aquila-7B at full size on one machine: load, generate, convert to Hugging Face; peak memory of each.

    python benchmarks/full_size.py [--model aquila-7b] [--work DIR] [--keep] [--layers N]

Random weights are written in the released format (14.6 GB in bf16, so about 30 GB of disk with the
conversion). Every stage runs in a process of its own, so that each peak is its own. Last line: JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from aquila.config import ModelConfig, load_model_config  # noqa: E402


def main() -> None:
    """The command; a stage calls it again with `--stage`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="aquila-7b", help="a folder under checkpoints_in/")
    parser.add_argument("--work", type=Path, default=Path("full_size_work"), help="where the files go")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--stage", choices=sorted(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args.work)))
        return
    config = load_model_config(ROOT / "checkpoints_in" / args.model)
    if args.layers:
        config = config.model_copy(update={"n_layers": args.layers})
    weights = 2 * config.parameter_count()
    print(f"{args.model}: {config.parameter_count():,} parameters, {weights / 1e9:.2f} GB in bf16")
    shutil.rmtree(args.work, ignore_errors=True)
    try:
        (args.work / "released").mkdir(parents=True)
        (args.work / "released" / "config.json").write_text(json.dumps(config.model_dump()))
        result = {"model": args.model, "weights_gb": round(weights / 1e9, 2)}
        for stage in ("write", "load", "generate", "convert"):
            result[stage] = run_stage(stage, args.work, weights)
    finally:
        if not args.keep:
            shutil.rmtree(args.work, ignore_errors=True)
    print(json.dumps(result))


def run_stage(stage: str, work: Path, weights: int) -> dict:
    """One stage in a process of its own: seconds, peak memory in GB and as a multiple of the weights."""
    command = [sys.executable, __file__, "--stage", stage, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stderr}")
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    peak = figures.pop("peak_bytes")
    figures = {**figures, "peak_gb": round(peak / 1e9, 2), "peak_over_weights": round(peak / weights, 3)}
    print(f"{stage:9s} {figures}", flush=True)
    return figures


def write(work: Path) -> dict:
    """Random weights in the released format, one matrix in memory at a time."""
    from aquila.model import AquilaModel
    from aquila.model.files import TensorInfo, write_torch

    config = ModelConfig(**json.loads((work / "released" / "config.json").read_text()))
    shapes = {name: tuple(p.shape) for name, p in AquilaModel(config, device="meta").named_parameters()}
    infos = {name: TensorInfo(shape, torch.bfloat16) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)

    def produce(name: str) -> torch.Tensor:
        values = torch.empty(shapes[name], dtype=torch.bfloat16)
        if len(shapes[name]) == 1:
            return values.fill_(1)
        return values.normal_(0, config.initializer_range, generator=generator)

    begin = time.perf_counter()
    write_torch(work / "released" / "pytorch_model.bin", infos, produce)
    return measured(begin)


def load(work: Path) -> dict:
    """`AquilaModel.from_pretrained`, bf16 on the CPU."""
    from aquila.model import AquilaModel

    begin = time.perf_counter()
    AquilaModel.from_pretrained(work / "released", dtype=torch.bfloat16)
    return measured(begin)


@torch.no_grad()
def generate(work: Path) -> dict:
    """Load, then 8 tokens greedily with a cache; seconds of the generation alone."""
    from aquila.model import AquilaModel, KVCache

    model = AquilaModel.from_pretrained(work / "released", dtype=torch.bfloat16)
    begin = time.perf_counter()
    cache, fresh, ids = KVCache(model.config, 1, 64, dtype=torch.bfloat16), torch.arange(1, 9)[None], []
    for _ in range(8):
        fresh = model.output(model.hidden(fresh, cache=cache)[:, -1]).argmax(-1, keepdim=True)
        ids.append(fresh.item())
    return {**measured(begin), "new_ids": ids}


def convert(work: Path) -> dict:
    """Released format to sharded safetensors for transformers."""
    from aquila.convert import main as command

    begin = time.perf_counter()
    status = command(["--input", str(work / "released"), "--output", str(work / "hf"), "--to", "hf"])
    assert status == 0
    files = sorted(f.name for f in (work / "hf").glob("*.safetensors"))
    return {**measured(begin), "shards": len(files)}


def measured(begin: float) -> dict:
    """Seconds since `begin`; peak resident memory of this process, torch itself included."""
    with open("/proc/self/status") as lines:
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return {"seconds": round(time.perf_counter() - begin, 1), "peak_bytes": peak}


STAGES = {"write": write, "load": load, "generate": generate, "convert": convert}

if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
