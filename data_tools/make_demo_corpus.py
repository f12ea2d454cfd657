"""Writes the demo corpus: bilingual JSONL whose every statement can be checked."""

import argparse
import json
import os
from pathlib import Path

from aquila.core.errors import run_command
from data_tools.demo_corpus import document


def write_corpus(path: Path, documents: int, seed: int) -> None:
    """`documents` lines of `{"text": ...}`, the same bytes for the same numbers on every machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for number in range(documents):
            file.write(json.dumps({"text": document(seed, number)}, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m data_tools.make_demo_corpus", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/demo.jsonl"), help="default: %(default)s")
    parser.add_argument("--documents", type=int, default=10_000, help="default: %(default)s, about 3 MB")
    parser.add_argument("--seed", type=int, default=2023, help="default: %(default)s")
    arguments = parser.parse_args()
    write_corpus(arguments.output, arguments.documents, arguments.seed)
    size = arguments.output.stat().st_size / 1e6
    print(f"{arguments.output}: {arguments.documents:,} documents, {size:.1f} MB")
    return 0


if __name__ == "__main__":
    run_command(main)
