"""Opening a corpus of many tokens: time and memory until the first sample.

    python benchmarks/data_order.py [--documents 100000000] [--tokens-a-document 1000] [--folder DIR]

The corpus is synthetic: a sparse `.bin` that takes no room, and an `.idx` of 20 bytes a document. Ranks are
processes of their own; memory is that of /proc/self/smaps_rollup, above what importing took. Two ranks begin
together on an empty folder ("cold": one builds the order, the other waits), then two again ("warm").
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from aquila.data.indexfile import bin_path, idx_path, write_index  # noqa: E402

RANK = """
import json, sys, time
from aquila.data.indexed import open_corpora

def memory():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    kib = {name: int(text.split()[0]) for name, text in fields.items()}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return private / 1024, kib["Rss"] / 1024 - private / 1024

before = memory()
print("ready", flush=True)
sys.stdin.readline()
begun = time.perf_counter()
stream = open_corpora([sys.argv[1]], "100", 2048, 1234, ids=1 << 20).train
stream.open_orders(0)
stream[0]
seconds = time.perf_counter() - begun
after = memory()
begun = time.perf_counter()
for k in range(0, stream.samples_per_epoch, max(1, stream.samples_per_epoch // 2000)):
    stream[k]
rate = 2000 / (time.perf_counter() - begun)
print(json.dumps({
    "seconds": round(seconds, 2), "private_mib": round(after[0] - before[0]), "samples_a_second": round(rate),
    "shared_mib": round(after[1] - before[1]), "samples": stream.samples_per_epoch,
}))
"""


def two_ranks(prefix: Path) -> list[dict]:
    """What two ranks say that begin at once."""
    command = [sys.executable, "-W", "ignore", "-c", RANK, str(prefix)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()
    return [json.loads(rank.communicate()[0]) for rank in ranks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--tokens-a-document", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        prefix = Path(folder) / "corpus"
        most = 2 * options.tokens_a_document
        lengths = np.random.default_rng(0).integers(1, most, options.documents, dtype=np.int32)
        tokens = int(lengths.sum(dtype=np.int64))
        with bin_path(prefix).open("wb") as file:
            file.truncate(4 * tokens)
        with idx_path(prefix).open("wb") as file:
            write_index(file, lengths)
        del lengths
        result = {"documents": options.documents, "tokens": tokens}
        result |= {"cold": two_ranks(prefix), "warm": two_ranks(prefix)}
        stored = sum(path.stat().st_size for path in Path(f"{prefix}.order").rglob("*") if path.is_file())
        print(json.dumps(result | {"stored_mib": stored >> 20}, indent=1))


if __name__ == "__main__":
    main()
