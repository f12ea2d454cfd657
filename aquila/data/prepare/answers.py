"""Conversations as text, and which of its tokens are answers.

A token counts where the last of its bytes belongs to an answer, or to what ends one: the separator behind it,
or the document's `</s>`. So the tokens are those of the whole text, as they come in generation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aquila.core.errors import UserError
from aquila.data.prepare.bad import BadDocumentError

AQUILA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
AQUILA_ROLES = {
    "human": "Human",
    "user": "Human",
    "gpt": "Assistant",
    "assistant": "Assistant",
    "system": "System",
}
TEMPLATES = ("plain", "aquila")
_SEPARATORS = {"plain": "\n", "aquila": "###"}

Part = tuple[str, bool]
"""A stretch of a conversation's text, and whether it is an answer's."""


def conversation(turns: Any, template: str) -> str:
    """The text of a FastChat conversation: `[{"from": ..., "value": ...}, ...]`.

    `plain`: the turns' values joined by one newline. `aquila`: AquilaChat's form, as FastChat's template
    "aquila-chat" writes it, `SYSTEM###Human: ...###Assistant: ...`; the document's `</s>` ends it.
    Raises `BadDocumentError`.
    """
    return "".join(text for text, _ in conversation_parts(turns, template))


def conversation_parts(turns: Any, template: str, *, answers: bool = False) -> list[Part]:
    """The same in parts. `answers`: every role must be known, and one of them an assistant's."""
    values = _values(turns)
    roles = (
        [_role(turn, number) for number, turn in enumerate(turns, start=1)]
        if _named(template, answers)
        else []
    )
    if answers and "Assistant" not in roles:
        raise BadDocumentError("no turn is an assistant's: there is nothing to train on")
    if template == "plain":
        said = list(zip([""] * len(values), values, roles or [""] * len(values), strict=True))
    else:
        systems = [value for role, value in zip(roles, values, strict=True) if role == "System"]
        said = [("", systems[-1] if systems else AQUILA_SYSTEM, "System")]
        said += [
            (f"{role}: ", value, role) for role, value in zip(roles, values, strict=True) if role != "System"
        ]
    parts: list[Part] = []
    for number, (prompt, value, role) in enumerate(said):
        counted = role == "Assistant"
        parts += [(prompt, False), (value, counted)]
        if number < len(said) - 1:
            parts.append((_SEPARATORS[template], counted))
    return parts


def _named(template: str, answers: bool) -> bool:
    return answers or template == "aquila"


def _values(turns: Any) -> list[str]:
    if not isinstance(turns, list) or not turns:
        raise BadDocumentError("'conversations' must hold a list of turns")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadDocumentError(f"turn {number} of the conversation has no text under 'value'")
    return [turn["value"] for turn in turns]


def _role(turn: dict[str, Any], number: int) -> str:
    sender = turn.get("from")
    role = AQUILA_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        known = ", ".join(AQUILA_ROLES)
        raise BadDocumentError(f"turn {number} is from {repr(sender)[:60]}; known are {known}")
    return role


def answer_mask(sizes: np.ndarray, framed: np.ndarray, parts: Sequence[Part] | None) -> np.ndarray:
    """uint8 (tokens,): 1 for each token of a framed document that counts; all but the first without parts.

    sizes: UTF-8 bytes of each id. Raises `UserError` for a tokenizer that rewrites its text.
    """
    mask = np.ones(len(framed), np.uint8)
    mask[0] = 0
    if parts is None:
        return mask
    counted = np.concatenate([np.full(len(text.encode()), answers, np.uint8) for text, answers in parts])
    ends = np.cumsum(sizes[framed[1:-1]])
    before = (int(ends[-1]) if len(ends) else 0) - len(counted)
    if before not in (0, 1):  # 1: the space that some put before every text
        raise UserError(
            "--mask-prompts: this tokenizer rewrites its text; nobody can say which tokens are an answer's: "
            f"{''.join(text for text, _ in parts)[:60]!r} becomes {ends[-1] if len(ends) else 0} bytes"
        )
    last = ends - 1 - before
    mask[1:-1] = np.where(last < 0, 0, counted[np.maximum(last, 0)])
    mask[-1] = parts[-1][1]
    return mask
