"""Builds the order of a run's data ahead of training, into PREFIX.order/ beside each dataset.

Every node without a shared disk may do this by itself: the order follows from data, split, sequence
length and seed alone. Training finds and maps it; without it, each rank builds it in memory.
"""

import argparse
import time
from pathlib import Path

from aquila.config import load_run_config, parse_blend
from aquila.core.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.build_index",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="run YAML, such as configs/Aquila-pretrain.yaml")
    parser.add_argument("model", help="folder under checkpoints_in/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the YAML file")
    parser.add_argument("--epochs", type=int, default=1, help="passes over each corpus; default: 1")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    effective = load_run_config(arguments.config, arguments.model, arguments.overrides)
    run = effective.run
    from aquila.data.indexed import open_corpora

    for prefix in run.datasets:
        try:
            Path(f"{prefix}.order").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{prefix}.order cannot be made: {error.strerror}") from None
    later = [prefix for _, blend in run.blends for prefix in parse_blend(blend)[0]]
    corpora = open_corpora(run.data_prefix, run.split, effective.seq_length, run.seed, later=later)
    for name, stream in (("training", corpora.train), ("validation", corpora.valid)):
        for corpus in stream.corpora if stream else ():
            for epoch in range(arguments.epochs if name == "training" else 1):
                started = time.monotonic()
                corpus.epoch_order(epoch)
                if not corpus.is_stored(epoch):
                    raise UserError(f"{corpus.prefix}.order: the order could not be written there")
                print(
                    f"{corpus.prefix}: {name}, epoch {epoch}: {corpus.samples_per_epoch:,} samples of "
                    f"{effective.seq_length} tokens, {time.monotonic() - started:.2f} s"
                )
    return 0


if __name__ == "__main__":
    run_command(main)
