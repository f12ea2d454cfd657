"""What a training step launches on a simulated Ascend NPU: kernels, bytes, what is kept for backward.

    python benchmarks/npu_launches.py [--attention auto|fused|triangle] [--packed] [--operators|--json]

Counts, not times: a device of host memory has no time to show. A layer is the difference of three layers and
two; bytes are in units of the residual stream (batch x sequence x dim in bf16), whatever the width.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH, DIM, VOCABULARY = 1, 1024, 256, 1000
MODEL = {
    "dim": DIM, "n_heads": 2, "vocab_size": VOCABULARY, "multiple_of": 32, "max_seq_len": LENGTH,
    "checkpoint_activations": False,
}  # fmt: skip


def measure(layers: int, attention: str, packed: bool) -> dict[str, Counter]:
    """Launches and bytes by operator of one forward and backward pass, and bytes kept between them."""
    import torch
    from npu_simulator import device

    from aquila.config import ModelConfig
    from aquila.model import AquilaModel

    config = ModelConfig(**MODEL, n_layers=layers)
    model = AquilaModel(config, attention=attention, device="npu:0", dtype=torch.bfloat16)
    tokens = torch.arange(ROWS * LENGTH, device="npu:0").view(ROWS, LENGTH) % VOCABULARY
    documents = tokens // 300 if packed else None
    model(tokens, labels=tokens, documents=documents).backward()
    device.LAUNCHED.clear()
    before = torch.npu.memory_allocated()
    loss = model(tokens, labels=tokens, documents=documents)
    kept = torch.npu.memory_allocated() - before
    loss.backward()
    return {
        "launches": Counter({name: found.count for name, found in device.LAUNCHED.items()}),
        "bytes": Counter({name: found.bytes for name, found in device.LAUNCHED.items()}),
        "kept": Counter(total=kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--operators", action="store_true", help="a line each")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.inside:
        sys.exit(simulated(sys.argv[1:]))
    two, three = (measure(layers, arguments.attention, arguments.packed) for layers in (2, 3))
    unit = 2 * ROWS * LENGTH * DIM
    layer = {what: Counter(three[what]) for what in three}
    for what, counts in layer.items():
        counts.subtract(two[what])
    rest = {what: sum(two[what].values()) - 2 * sum(layer[what].values()) for what in layer}
    trips = sum(
        count for name, count in three["launches"].items() if "_local_scalar" in name or "host" in name
    )
    if arguments.json:
        totals = {what: sum(counts.values()) for what, counts in layer.items()}
        print(json.dumps({"model": {**MODEL, "n_layers": 1}, "layer": totals, "round_trips": trips}))
        return
    print(f"a layer: {sum(layer['launches'].values())} launches, {sum(layer['bytes'].values()) / unit:.1f} "
          f"units moved, {layer['kept']['total'] / unit:.2f} units kept")  # fmt: skip
    print(
        f"the rest: {rest['launches']} launches, {rest['bytes'] / unit:.1f} units; host round trips {trips}"
    )
    if arguments.operators:
        for name, count in layer["launches"].most_common():
            print(f"{count:4d} {layer['bytes'][name] / unit:7.2f}  {name}")


def simulated(words: list[str]) -> int:
    """This program again, in a process that sees a simulated NPU."""
    sys.path.insert(0, str(ROOT))
    from tests.npu_simulator import cann

    if lack := cann.missing():
        sys.exit(lack)
    with tempfile.TemporaryDirectory() as folder:
        variables = cann.build(Path(folder))
        path = f"{ROOT}:{variables['PYTHONPATH']}"
        environment = {**os.environ, **variables, "PYTHONPATH": path}
        return subprocess.run([sys.executable, __file__, *words, "--inside"], env=environment).returncode


if __name__ == "__main__":
    main()
