"""Generation without a conversation: one prompt, or a file of them."""

import json
import sys
from pathlib import Path
from typing import TextIO

from aquila.core.errors import UserError
from aquila.generation.answers import Answer
from aquila.generation.chat import Session
from aquila.generation.tty import write


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: a line each, or in a `.jsonl` file the `prompt` of each line's object.

    Empty lines are skipped. Raises `UserError` for a file that cannot be read, with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_json_prompt(path, number, line) for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise UserError(f"{path}: holds no prompt; write one a line")
    return prompts


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'{path}, line {number}: must be an object {{"prompt": "..."}}')
    return prompt


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
