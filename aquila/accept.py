"""Checks a new machine before a run is trusted to it: machine, operators, collectives, training, speed.

    python -m aquila.accept [--quick] [--hostfile FILE] [--weights DIR] [--json FILE]

Runs on the device that is here (NPU, GPU or CPU), one line a check: PASS, FAIL or SKIP, what was measured,
the limit. Ends with a paragraph for a README. Exit status: 0 when nothing failed, 1 when something did, 2 for
a wrong argument.
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from aquila.acceptance.collectives import check_collectives
from aquila.acceptance.hosts import check_hosts
from aquila.acceptance.machine import check_machine
from aquila.acceptance.model import check_model
from aquila.acceptance.operators import check_attention, check_operators
from aquila.acceptance.optimizer import check_optimizer
from aquila.acceptance.released import check_weights
from aquila.acceptance.speed import check_speed
from aquila.acceptance.table import Table
from aquila.acceptance.training import check_training
from aquila.backend import detect, get_backend
from aquila.core.errors import EXIT_FAILURE, run_command
from aquila.core.files import write_atomically
from aquila.launch import toolkit
from aquila.launch.hostfile import read_hostfile
from aquila.model.weights import load_config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m aquila.accept", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="this process alone: no training runs")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="its other hosts, and all as one")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="a model folder to load and continue")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results there as well; -: print them"
    )
    arguments = parser.parse_args()
    if arguments.hostfile:
        read_hostfile(arguments.hostfile)
    if arguments.weights:
        load_config(arguments.weights)
    toolkit.set_up()
    backend = get_backend(detect())
    device = backend.set_device(0)
    precisions = backend.supported_precisions()
    dtypes = [DTYPES[precision] for precision in precisions]
    machine = {
        "device": f"{backend.device_count()} x {backend.device_name()}",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    table = Table(show=lambda line: print(line, flush=True))
    check_machine(table)
    check_operators(table, backend, device, dtypes)
    check_attention(table, backend, device, dtypes)
    check_optimizer(table, backend, device)
    check_model(table, backend, device, dtypes)
    if arguments.weights:
        check_weights(table, arguments.weights, device, dtypes[0])
    if not arguments.quick:
        devices = backend.device_count()
        check_collectives(table, min(2, devices) if device.type == "cpu" else devices)
        check_training(table, devices, precisions[0], backend.OVERLAP_COMM)
    if arguments.hostfile:
        check_hosts(table, arguments.hostfile)
    check_speed(table, backend, device, dtypes)
    paragraph = table.paragraph(machine)
    print(f"\n{paragraph}")
    if arguments.json:
        found = {"machine": machine, "results": [asdict(r) for r in table.results], "paragraph": paragraph}
        if str(arguments.json) == "-":
            print(json.dumps(found), flush=True)
        else:
            write_atomically(arguments.json, json.dumps(found, indent=1))
    return EXIT_FAILURE if table.counts()["FAIL"] else 0


if __name__ == "__main__":
    run_command(main)
