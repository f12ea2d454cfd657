"""Asks a model trained on the demo corpus for facts of its grammar and counts the right answers.

The last lines say how the run went: first and last loss, and prompts completed correctly.
"""

import argparse
import math
from pathlib import Path

from aquila.core.errors import run_command
from data_tools.demo_corpus import draw_prompts, is_correct


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.check_demo",
        description="Counts a model's right answers to the demo corpus.",
    )
    parser.add_argument("--model-dir", help="model or run folder (default: the newest run)")
    parser.add_argument("--prompts", type=int, default=50, help="how many prompts (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="which prompts (default: 0)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    from aquila.generation import generate
    from aquila.generation.locate import resolve_checkpoint
    from aquila.model import AquilaModel
    from aquila.tokenizer import load_tokenizer
    from aquila.training.metrics import read_metrics

    folder = resolve_checkpoint(arguments.model_dir, Path.cwd())
    tokenizer = load_tokenizer(folder)
    facts = draw_prompts(arguments.prompts, arguments.seed)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt, _ in facts]
    answers = generate(AquilaModel.from_pretrained(folder), prompts, max_new_tokens=16, temperature=0.0)
    right = 0
    for (prompt, expected), ids in zip(facts, answers, strict=True):
        completion = tokenizer.decode(ids)
        if is_correct(completion, expected):
            right += 1
        else:
            print(f"wrong: {prompt!r} -> {completion!r}, expected {expected!r}")
    run = folder.parent.parent
    records = [r for r in read_metrics(run / "metrics.jsonl") if r.get("loss") is not None]
    if records:
        print(
            f"loss {records[0]['loss']:.3f} (ln of the vocabulary: {math.log(tokenizer.vocab_size):.3f}) -> "
            f"{records[-1]['loss']:.3f} after {records[-1]['step']} steps; drawn in {run / 'loss.png'}"
        )
    print(f"{right} of {len(facts)} prompts completed correctly")
    return 0


if __name__ == "__main__":
    run_command(main)
