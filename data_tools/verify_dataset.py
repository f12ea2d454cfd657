"""Checks datasets byte by byte: structure, sizes, ids, framing, checksums. Status 2 when one is bad."""

import argparse

from aquila.core.errors import EXIT_USER_ERROR, run_command
from aquila.data.verify import verify_dataset


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.verify_dataset", description=__doc__)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="without .bin and .idx")
    parser.add_argument("--vocab-size", type=int, help="the model's; default: the tokenizer's of .meta.json")
    arguments = parser.parse_args()
    bad = False
    for prefix in arguments.prefixes:
        problems = verify_dataset(prefix, arguments.vocab_size)
        print(f"{prefix}: {'BAD' if problems else 'good'}")
        for problem in problems:
            print(f"  {problem}")
        bad = bad or bool(problems)
    return EXIT_USER_ERROR if bad else 0


if __name__ == "__main__":
    run_command(main)
