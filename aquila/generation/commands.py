"""What a line of a conversation means: a prompt, a /command, or a word that leaves."""

import shlex
from dataclasses import fields

from aquila.config.strict import nearest
from aquila.core.errors import UserError
from aquila.generation.chat import Session
from aquila.generation.sampling import Sampling

LEAVE = ("exit", "quit", "false")
SETTINGS = tuple(field.name for field in fields(Sampling))
_KINDS = {
    "max_new_tokens": int,
    "top_k": int,
    "temperature": float,
    "top_p": float,
    "repetition_penalty": float,
}

HELP = f"""\
Type a text and press Enter: the model goes on with it.
  Alt-Enter        a new line within the text (pasted text keeps its lines)
  Up, Down         earlier texts; Ctrl-R searches in them
  Tab              completes a command
  Ctrl-C           stops the answer; at the prompt it empties the line
  Ctrl-D, {", ".join(LEAVE)}   leave
  /set             the settings; /set NAME VALUE changes one: {", ".join(SETTINGS)}
  /set stop A B    the answer ends before A or B; /set stop alone removes them
  /seed [N]        the same seed gives the same text; without N a new one each time
  /more            goes on with the last answer
  /stats           tokens per second and time to the first token of the last answer
  /clear           empties the screen and forgets the last answer
  /help            this text
"""


def leaves(line: str) -> bool:
    """Whether the line is one of the words that end the conversation."""
    return line.strip().lower() in (*LEAVE, "/exit", "/quit")


def is_command(line: str) -> bool:
    return line.startswith("/") and line[1:2].isalpha()


def run_command_line(session: Session, line: str) -> str:
    """Carries out a /command; returns what to show. Raises `UserError` for one that cannot be."""
    try:
        name, *arguments = shlex.split(line[1:])
    except ValueError as error:
        raise UserError(f"{line}: {error}") from None
    command = COMMANDS.get(name.lower())
    if command is None:
        hint = nearest(name.lower(), list(COMMANDS)) or "; /help lists them"
        raise UserError(f"no command /{name}{hint}")
    return command(session, arguments)


def _help(session: Session, arguments: list[str]) -> str:
    return HELP


def _set(session: Session, arguments: list[str]) -> str:
    if arguments:
        name = arguments[0].lstrip("-").replace("-", "_").lower()
        if name not in SETTINGS:
            raise UserError(f"no setting '{name}'{nearest(name, list(SETTINGS)) or '; /set lists them'}")
        session.set(name, _value(name, arguments[1:]))
        return f"{name} = {_show(session, name)}\n"
    return "".join(f"  {name:19} {_show(session, name)}\n" for name in SETTINGS)


def _value(name: str, texts: list[str]) -> object:
    if name == "stop":
        return tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in texts)
    if name == "seed" and (not texts or texts[0] in ("none", "off", "random")):
        return None
    kind = _KINDS.get(name, int)
    if len(texts) != 1:
        raise UserError(f"/set {name} takes one value")
    try:
        return kind(texts[0])
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} must be {what} (got {texts[0]!r})") from None


def _show(session: Session, name: str) -> str:
    value = getattr(session.sampling, name)
    if name == "seed" and value is None:
        return "new each time"
    if name == "stop":
        return " ".join(repr(text) for text in value) or "none"
    return str(value)


def _seed(session: Session, arguments: list[str]) -> str:
    return _set(session, ["seed", *arguments])


def _stats(session: Session, arguments: list[str]) -> str:
    answer = session.last
    if answer is None:
        return "no answer yet\n"
    rate, first = answer.tokens_per_second, answer.time_to_first_token
    return (
        f"{answer.prompt_tokens} prompt tokens, {answer.new_tokens} new in {answer.seconds:.2f} s "
        f"(ended by {answer.finish_reason}), seed {answer.sequence.seed}\n"
        f"time to first token {'-' if first is None else f'{first * 1000:.0f} ms'}, "
        f"then {'-' if rate is None else f'{rate:.1f}'} tokens/s\n"
    )


def _clear(session: Session, arguments: list[str]) -> str:
    session.last = None
    return "\x1b[2J\x1b[H"


def more_prompt(session: Session) -> str:
    """The text that /more goes on with. Raises `UserError` when there is none."""
    if session.last is None:
        raise UserError("no answer yet that /more could go on with")
    return session.last.prompt + session.last.text


COMMANDS = {"help": _help, "set": _set, "seed": _seed, "stats": _stats, "clear": _clear, "more": None}
COMPLETIONS = [f"/{name}" for name in COMMANDS] + [f"/set {name} " for name in SETTINGS]
"""What Tab completes a line to."""
