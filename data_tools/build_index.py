"""Builds the order of a run's data ahead of training, into PREFIX.order/ beside each dataset.

Training does this by itself, once a node, when it begins and before each epoch ends; done ahead of it, the
first step of a large corpus comes sooner. Each node without a shared disk has an order of its own, which is
the same: it follows from data, split, sequence length and seed alone.
"""

import argparse
import time

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

    later = [prefix for _, blend in run.blends for prefix in parse_blend(blend)[0]]
    corpora = open_corpora(run.data_prefix, run.split, effective.seq_length, run.seed, later=later)
    for name, stream in (("training", corpora.train), ("validation", corpora.valid)):
        for corpus in stream.corpora if stream else ():
            for epoch in range(arguments.epochs if name == "training" else 1):
                started = time.monotonic()
                corpus.epoch_order(epoch)
                if not corpus.is_stored(epoch):
                    raise UserError("; ".join(corpus.notes) or f"{corpus.prefix}: no order was stored")
                print(
                    f"{corpus.prefix}: {name}, epoch {epoch}: {corpus.samples_per_epoch:,} samples of "
                    f"{effective.seq_length} tokens, {time.monotonic() - started:.2f} s"
                )
    return 0


if __name__ == "__main__":
    run_command(main)
