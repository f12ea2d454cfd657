"""Merges datasets of one tokenizer into one, in the order given."""

import argparse

from aquila.core.errors import run_command
from aquila.data.merge import merge_datasets


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.merge_datasets", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="without .bin and .idx")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    arguments = parser.parse_args()
    counts = merge_datasets(arguments.input, arguments.output_prefix)
    print(f"{arguments.output_prefix}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    return 0


if __name__ == "__main__":
    run_command(main)
