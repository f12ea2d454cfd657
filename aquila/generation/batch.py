"""Generation without a conversation: one prompt, or a file of them."""

import json
import sys
from pathlib import Path
from typing import TextIO

from aquila.core.errors import UserError
from aquila.core.text_files import read_text, text_under
from aquila.generation.answers import Answer
from aquila.generation.chat import Session
from aquila.generation.tty import write


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line each, or in a `.jsonl` file the `prompt` of each line's object.

    Empty lines are skipped. Raises `UserError` for a file that cannot be read, with the line.
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    numbered = [(number, line.rstrip("\r")) for number, line in lines if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [text_under(line, "prompt", f"{path}, line {number}") for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def run_prompts(session: Session, prompts: list[str], samples: int, as_json: bool) -> int:
    """Answers `prompts` on standard output: as text, or with `as_json` one JSON object a line."""
    if len(prompts) == samples == 1 and not as_json:
        for piece, _ in session.answer(prompts[0]):
            write(piece)
        write("\n")
        explain_end(session.last, session)
        return 0
    total = len(prompts) * samples
    for number, answer in enumerate(session.answers(prompts, samples), 1):
        if as_json:
            print(json.dumps(answer.as_dict(), ensure_ascii=False), flush=True)
        else:
            title = answer.prompt.replace("\n", " ")[:60]
            write(f"[{number}/{total}] {title}\n{answer.text}\n\n")
            explain_end(answer, session, f"[{number}/{total}] ")
    return 0


def explain_end(answer: Answer | None, session: Session, which: str = "", file: TextIO | None = None) -> None:
    """Says on `file` (default: standard error) when an answer ended because the context is full."""
    if answer is not None and answer.finish_reason == "context":
        size = session.loaded.model.config.max_seq_len
        print(
            f"{which}(the context of {size} tokens is full; --sliding lets it slide)",
            file=file or sys.stderr,
            flush=True,
        )
