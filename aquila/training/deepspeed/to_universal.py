"""DeepSpeed's converter to universal checkpoints, in a process of its own, reading weights only.

`python -m aquila.training.deepspeed.to_universal --input_folder ... --output_folder ...`
"""

import torch

from aquila.core.errors import run_command
from aquila.training.deepspeed.safe_load import load

# Here, not under `main`: a worker process that does not start as a copy of this one imports this file.
torch.load = load  # type: ignore[assignment]


def main() -> None:
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    run_command(main)
