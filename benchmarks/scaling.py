"""Expected efficiency of ZeRO-2 on 8 to 1,024 devices, by the formulas of docs/scaling.md. Nothing runs.

    python benchmarks/scaling.py [MODEL/config.json] [--samples 2] [--accumulation 1] [--tflops 495] [--json]

Prints the share of the ideal tokens/s that each number of devices keeps, a column a link speed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aquila.config import ModelConfig, load_model_config  # noqa: E402

DEVICES = (8, 16, 32, 64, 128, 256, 512, 1024)
LINKS = (25, 100, 200, 400)
PER_NODE = 8
WITHIN = 300e9
LINK_SHARE = 0.8
BUCKET = 1e8
HOP_SECONDS = 10e-6
JITTER = 0.01


def communication(parameters: int, devices: int, gigabits: float) -> tuple[float, float]:
    """Seconds of one micro step's gradient reduction, and of the step's gathering of weights."""
    nodes = -(-devices // PER_NODE)
    between = PER_NODE * gigabits / 8 * 1e9 * LINK_SHARE
    speed = WITHIN if nodes == 1 else min(WITHIN, between)
    pass_of_ring = 2 * parameters * (devices - 1) / devices / speed
    wait = 2 * math.log2(devices) * HOP_SECONDS
    return 2 * pass_of_ring + wait * math.ceil(parameters / BUCKET), pass_of_ring + wait


def efficiency(config: ModelConfig, tokens: int, micro_steps: int, flops: float, devices: int, link: float):
    """Share of the ideal tokens/s: computing time over the time of a whole step."""
    micro = tokens * config.flops_per_token(config.max_seq_len) / flops
    reduce, gather = communication(config.parameter_count(), devices, link)
    exposed = max(0.0, reduce - micro * 2 / 3)  # the backward pass is two thirds, and hides what fits in it
    slowest = micro * JITTER * math.sqrt(2 * math.log(devices))
    step = micro_steps * (micro + exposed + slowest) + gather
    return micro_steps * micro / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "checkpoints_in" / "aquila-7b")
    parser.add_argument("--samples", type=int, default=2, help="a device and micro step; default: 2")
    parser.add_argument("--accumulation", type=int, default=1, help="micro steps; default: %(default)s")
    parser.add_argument("--tflops", type=float, default=495, help="a device reaches alone")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = load_model_config(options.model.parent if options.model.is_file() else options.model)
    tokens = options.samples * config.max_seq_len
    table = {
        devices: {
            link: efficiency(config, tokens, options.accumulation, options.tflops * 1e12, devices, link)
            for link in LINKS
        }
        for devices in DEVICES
    }
    if options.json:
        print(json.dumps(table))
        return
    print("| devices | " + " | ".join(f"{link} Gbit/s" for link in LINKS) + " |")
    print("|---" * (len(LINKS) + 1) + "|")
    for devices, row in table.items():
        print(f"| {devices} | " + " | ".join(f"{value:.0%}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
