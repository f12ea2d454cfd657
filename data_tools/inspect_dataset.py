"""Shows a dataset: its description, documents decoded, and how long documents are."""

import argparse
from pathlib import Path

import numpy as np

from aquila.core.errors import UserError, run_command
from aquila.data.indexfile import Index, read_index, read_tokens
from aquila.data.loss_mask import check_mask, marked, mask_prefix
from aquila.data.meta import read_meta
from aquila.tokenizer import Tokenizer, load_tokenizer

_BAR = 40


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m data_tools.inspect_dataset", description=__doc__)
    parser.add_argument("prefix", metavar="PREFIX", help="without .bin and .idx")
    parser.add_argument("--documents", metavar="I..J", help="decode documents I to J, both included")
    parser.add_argument("--model-dir", metavar="DIR", help="whose tokenizer decodes; else ids are shown")
    parser.add_argument("--histogram", action="store_true", help="document lengths as text")
    parser.add_argument("--png", type=Path, metavar="FILE", help="document lengths as a picture")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    index, meta = read_index(arguments.prefix), read_meta(arguments.prefix)
    made = f"{meta['made_by']}, {meta['tokenizer']['vocab_size']} ids" if meta else "no .meta.json"
    print(
        f"{arguments.prefix}: {len(index.documents) - 1:,} documents, {index.tokens:,} {index.dtype} tokens "
        f"({made})"
    )
    facts = check_mask(arguments.prefix, index, meta)
    if facts:
        print(f"  loss mask: {facts['counted']:,} tokens count; in documents, they stand between ⟦ and ⟧")
    for item in meta["inputs"] if meta else ():
        print(f"  from {item['path']} ({item['size']:,} bytes)")
    if arguments.documents:
        tokenizer = load_tokenizer(arguments.model_dir) if arguments.model_dir else None
        if tokenizer and meta and meta["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            raise UserError(
                f"{arguments.prefix} was made with another tokenizer than {arguments.model_dir} has"
            )
        mask = masked_tokens(arguments.prefix) if facts else None
        show_documents(arguments.prefix, index, arguments.documents, tokenizer, mask)
    lengths = document_lengths(index)
    if arguments.histogram:
        print("\n".join(histogram(lengths)))
    if arguments.png:
        draw(lengths, arguments.png)
        print(f"drawn in {arguments.png}")
    return 0


def masked_tokens(prefix: str) -> np.ndarray:
    """The loss mask of a dataset: uint8 (tokens,)."""
    path = mask_prefix(prefix)
    return read_tokens(path, read_index(path))


def show_documents(
    prefix: str, index: Index, wanted: str, tokenizer: Tokenizer | None, mask: np.ndarray | None = None
) -> None:
    """Prints documents of a range `I..J` (or `I`). Raises `UserError` for one that does not exist."""
    count = len(index.documents) - 1
    try:
        first, _, last = wanted.partition("..")
        numbers = range(int(first), int(last or first) + 1)
    except ValueError:
        raise UserError(f"--documents {wanted}: give I..J, such as 0..3") from None
    if not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise UserError(f"--documents {wanted}: the dataset has documents 0..{count - 1}")
    tokens = read_tokens(prefix, index)
    for number in numbers:
        start = int(index.offsets[index.documents[number]]) // index.dtype.itemsize
        stop = start + int(document_lengths(index, number, number + 1)[0])
        ids = tokens[start:stop].tolist()
        counted = mask[start:stop].astype(bool) if mask is not None else None
        more = "" if counted is None else f", {int(counted.sum())} count in the loss"
        print(f"--- document {number}: {len(ids)} tokens{more}")
        print(marked(ids, counted, tokenizer))


def document_lengths(index: Index, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Tokens of each document."""
    borders = index.documents[first : None if stop is None else stop + 1]
    inside = index.lengths[borders[0] : borders[-1]]
    ends = np.concatenate(([0], np.cumsum(inside, dtype=np.int64)))
    return np.diff(ends[borders - borders[0]])


def histogram(lengths: np.ndarray) -> list[str]:
    """Documents by length in powers of two, as lines of text, with the share of all tokens."""
    if not len(lengths):
        return ["no documents"]
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    lines = [
        f"lengths: shortest {lengths.min():,}, median {int(np.median(lengths)):,}, "
        f"mean {lengths.mean():,.1f}, longest {lengths.max():,} tokens"
    ]
    counts = np.bincount(powers)
    sums = np.bincount(powers, weights=lengths)
    for power in range(powers.min(), len(counts)):
        bar = "#" * round(_BAR * counts[power] / counts.max())
        share = sums[power] / max(lengths.sum(), 1)
        lines.append(f"<= {1 << power:>10,}  {counts[power]:>12,} documents  {share:4.0%} of tokens  {bar}")
    return lines


def draw(lengths: np.ndarray, path: Path) -> None:
    """The histogram as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    edges = 2.0 ** np.arange(0, np.ceil(np.log2(max(lengths.max(initial=1), 2))) + 1)
    axes.hist(lengths, bins=edges, color="#3b6ea5", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens in a document, [CLS] and </s> included")
    axes.set_ylabel("documents")
    axes.set_title(f"{len(lengths):,} documents, {int(lengths.sum()):,} tokens")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_command(main)
