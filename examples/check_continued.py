"""Recomputes what `continued_pretraining.sh` reports by numpy, torch and transformers, without the package.

    python examples/check_continued.py FOLDER

The order of the data is made again from `data_order.json` and the `.bin/.idx` files; losses are transformers'
on the exports; counts, times and averages follow from the raw records. Prints a line for each check; status 1
when one fails.
"""

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
FAILED = []


def check(name: str, ours: float, theirs: float, limit: float = 1e-4) -> None:
    good = abs(ours - theirs) <= limit * max(1.0, abs(theirs))
    print(f"{'pass' if good else 'FAIL'}  {name}: {ours:.6g}, recomputed {theirs:.6g}")
    if not good:
        FAILED.append(name)


def read_dataset(prefix: str) -> list[np.ndarray]:
    """The documents of a Megatron dataset of int32 tokens."""
    raw = (ROOT / f"{prefix}.idx").read_bytes()
    _, _, code, count, _ = struct.unpack_from("<9sQBQQ", raw)
    assert code == 4
    lengths = np.frombuffer(raw, "<i4", count, offset=34)
    tokens = np.fromfile(ROOT / f"{prefix}.bin", "<i4")
    return np.split(tokens, np.cumsum(lengths)[:-1])


class Corpus:
    """Samples of seq_length + 1 tokens: documents shuffled, joined, cut, and the cuts shuffled, by pass."""

    def __init__(self, prefix: str, length: int, seed: int) -> None:
        self.documents, self.length, self.seed = read_dataset(prefix), length, seed
        self.samples = (sum(map(len, self.documents)) - 1) // length
        self.passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, index: int) -> np.ndarray:
        number, place = divmod(index, self.samples)
        if number not in self.passes:
            random = np.random.RandomState(self.seed if number == 0 else [self.seed, number])
            order = np.arange(len(self.documents), dtype=np.int32)
            random.shuffle(order)
            cuts = np.arange(self.samples, dtype=np.uint32)
            random.shuffle(cuts)
            self.passes[number] = np.concatenate([self.documents[i] for i in order]), cuts
        tokens, cuts = self.passes[number]
        start = int(cuts[place]) * self.length
        return tokens[start : start + self.length + 1]


def blend(weights: list[float], count: int) -> list[int]:
    """Which corpus gives each sample: always the one that lags furthest behind its weight."""
    shares, given, which = np.array(weights) / sum(weights), np.zeros(len(weights)), []
    for k in range(count):
        which.append(int(np.argmax(shares * max(k, 1) - given)))
        given[which[-1]] += 1
    return which


def stream(corpora: dict[str, Corpus], weights: dict[str, float], count: int) -> list[tuple[str, np.ndarray]]:
    """(corpus, tokens) of the first samples of a blend."""
    names, taken, found = list(weights), dict.fromkeys(weights, 0), []
    for place in blend(list(weights.values()), count):
        found.append((names[place], corpora[names[place]][taken[names[place]]]))
        taken[names[place]] += 1
    return found


@torch.no_grad()
def losses(model, rows: list[np.ndarray]) -> float:
    """Mean nats a token of transformers' model."""
    total = count = 0.0
    for row in rows:
        tokens = torch.from_numpy(row.astype(np.int64))
        logits = model(tokens[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
        count += len(row) - 1
    return total / count


def records_of(name: str) -> tuple[Path, list[dict], list[dict]]:
    """The run folder, its records and its starts."""
    metrics = max(
        (ROOT / "checkpoints_out" / name).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime
    )
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    history = [json.loads(line) for line in (metrics.parent / "history.jsonl").read_text().splitlines()]
    return metrics.parent, lines, history


def check_run(work: Path, name: str, told: dict, model, before=None) -> None:
    """before: the model that the run began with, where that is known."""
    folder, records, history = records_of(f"example-{name}")
    config, order = history[-1]["config"], json.loads((folder / "data_order.json").read_text())
    length, last = order["seq_length"], records[-1]

    # Validation: the first samples of each set, by transformers
    size = len(vocabulary(work / f"hf-{name}"))
    for set_name, data in config["valid_data"].items():
        items = data.split() if isinstance(data, str) else data
        names = [item for item in items if not is_number(item)]
        weights = [float(item) for item in items if is_number(item)] or [1.0]
        corpora = {prefix: Corpus(prefix, length, 0) for prefix in names}
        count = min(16 * config["eval_iters"], sum(corpus.samples for corpus in corpora.values()))
        rows = [row for _, row in stream(corpora, dict(zip(names, weights, strict=True)), count)]
        nats = losses(model, rows)
        check(f"{name}, validation loss of {set_name}", last["valid_losses"][set_name], nats)
        labels = np.concatenate([row[1:] for row in rows])
        assert labels.max() < size + 8
        bits = nats * len(labels) / math.log(2) / sum(text_bytes(work / f"hf-{name}")[i] for i in labels)
        check(f"{name}, bits per byte of {set_name}", last["valid_bits_per_byte"][set_name], bits)
        told_set = told["valid_losses"][set_name]
        values = [record["valid_losses"][set_name] for record in records if record.get("valid_losses")]
        for key, value in (("first", values[0]), ("last", values[-1]), ("best", min(values))):
            check(f"{name}, {key} validation loss of {set_name} in the report", told_set[key], value, 0)

    # Training: which samples, of which corpus, and their loss where the weights are known
    segments = order["segments"]
    assert len(segments) == 1
    corpora = {prefix: Corpus(prefix, length, order["seed"]) for prefix in segments[0]["weights"]}
    read = stream(corpora, segments[0]["weights"], last["consumed_samples"])
    steps = [record for record in records if record["step"] > 0]
    sizes = {int(step): samples for step, samples in config["batch_size_schedule"].items()} or {0: 8}
    done = 0
    for record in steps:
        samples = next(size for after, size in sorted(sizes.items(), reverse=True) if after < record["step"])
        done += samples
        if record["consumed_samples"] != done or record["consumed_tokens"] != done * length:
            FAILED.append(f"{name}, samples of step {record['step']}")
        if len(corpora) > 1:
            parts = [(record["train_losses"][c], record["counted_tokens"][c]) for c in record["train_losses"]]
            mean = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
            if abs(mean - record["loss"]) > 1e-5 or sum(count for _, count in parts) != samples * length:
                FAILED.append(f"{name}, loss by corpus of step {record['step']}")
            for corpus in record["counted_tokens"]:
                here = sum(c == corpus for c, _ in read[done - samples : done])
                if record["counted_tokens"][corpus] != here * length:
                    FAILED.append(f"{name}, tokens of {corpus} in step {record['step']}")
    check(f"{name}, samples of {len(steps)} steps", last["consumed_samples"], done, 0)
    for corpus in corpora:
        check(
            f"{name}, samples read of {corpus}",
            told["consumed_samples"][corpus],
            sum(c == corpus for c, _ in read),
            0,
        )
    if before is not None:
        first = steps[0]["consumed_samples"]
        check(f"{name}, loss of step 1", steps[0]["loss"], losses(before, [row for _, row in read[:first]]))

    # The report's other numbers
    check(f"{name}, first loss", told["first_loss"], steps[0]["loss"], 0)
    check(f"{name}, last loss", told["last_loss"], steps[-1]["loss"], 0)
    check(f"{name}, tokens", told["consumed_tokens"], done * length, 0)
    spent = sum(record["step_seconds"] for record in steps)
    wall = last["time"] - history[0]["time"]
    check(f"{name}, goodput", told["goodput"], spent / wall, 1e-9)
    check(f"{name}, starts", len(told["starts"]), len(history), 0)


def is_number(item) -> bool:
    try:
        float(item)
    except ValueError:
        return False
    return True


def vocabulary(folder: Path) -> dict[str, int]:
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8"))


def text_bytes(folder: Path) -> np.ndarray:
    """Bytes of each id: a letter of the byte-level vocabulary stands for one; special tokens have none."""
    vocab = vocabulary(folder)
    sizes = np.zeros(len(vocab) + 8, np.int64)
    for token, index in vocab.items():
        sizes[index] = 0 if token == "<|endoftext|>" else len(token)
    return sizes


def check_average(work: Path) -> None:
    from safetensors.numpy import load_file

    record = json.loads((work / "averaged" / "average.json").read_text())
    members = [load_file(Path(member["path"]) / "model.safetensors") for member in record["members"]]
    average = load_file(work / "averaged" / "model.safetensors")
    worst = max(
        float(
            np.abs(average[name] - np.mean([member[name].astype(np.float64) for member in members], 0)).max()
        )
        for name in average
    )
    check("averaged, largest difference of a weight from the mean", worst, 0.0, 1e-6)


@torch.no_grad()
def check_scores(work: Path, told: dict, model) -> None:
    """The last score of the harness: which option is likeliest after [CLS] and its question."""
    if told.get("lm_eval") is None:
        print("skip  scores: lm_eval is not installed")
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "hf-long")
    items = [json.loads(line) for line in (work / "tasks" / "words.jsonl").read_text().splitlines()]
    right = 0
    for item in items:
        start = [tokenizer.bos_token_id, *tokenizer.encode(item["question"], add_special_tokens=False)]
        scores = []
        for option in item["options"]:
            text = item["question"] + option
            whole = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
            logs = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[at - 1, whole[at]]) for at in range(len(start), len(whole))))
        right += scores.index(max(scores)) == item["answer"]
    check(
        "long, accuracy of example_words", told["lm_eval"]["lm_eval"]["example_words/acc"], right / len(items)
    )


def main() -> int:
    from transformers import AutoModelForCausalLM

    work = Path(sys.argv[1]).resolve()
    told = {
        name.split("/")[0]: run
        for name, run in json.loads((work / "report.json").read_text())["runs"].items()
    }
    models = {
        name: AutoModelForCausalLM.from_pretrained(work / f"hf-{name}", dtype=torch.float32)
        for name in ("base", "continued", "long", "averaged")
    }
    check_run(work, "base", told["example-base"], models["base"])
    check_run(work, "continued", told["example-continued"], models["continued"], models["base"])
    check_run(work, "long", told["example-long"], models["long"])
    check_average(work)
    check_scores(work, told["example-long"], models["long"])
    print(f"{len(FAILED)} check(s) failed" + "".join(f"\n  {name}" for name in FAILED))
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
