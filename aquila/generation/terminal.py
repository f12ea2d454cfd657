"""The conversation: at a terminal with line editing and history, or line by line from a pipe."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from aquila.core.errors import UserError
from aquila.generation.batch import explain_end
from aquila.generation.chat import Session
from aquila.generation.commands import COMPLETIONS, is_command, leaves, more_prompt, run_command_line
from aquila.generation.tty import not_utf8, write


def converse_by_lines(session: Session, as_json: bool) -> int:
    """Standard input without a terminal: a prompt a line, an answer each, until it ends."""
    status = 0
    for number, line in enumerate(sys.stdin, start=1):
        line = line.rstrip("\r\n").removeprefix("\ufeff" if number == 1 else "")
        if leaves(line):
            break
        try:
            if not_utf8(line):
                raise UserError(
                    f"standard input, line {number}: not UTF-8 text; convert it, for instance with "
                    "`iconv -f GB18030 -t UTF-8`"
                )
            _take(session, line, as_json, interactive=False)
        except UserError as error:  # the other lines still get their answers
            print(f"error: {error}", file=sys.stderr)
            status = error.exit_status
    return status


def converse(session: Session, as_json: bool = False) -> int:
    """A conversation at the terminal."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.shortcuts import CompleteStyle

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history = _history_file()
    prompt = PromptSession(
        history=FileHistory(str(history)) if history else InMemoryHistory(),
        key_bindings=keys,
        completer=WordCompleter(COMPLETIONS, sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
        complete_while_typing=False,
        prompt_continuation="  ",
        enable_suspend=True,
    )
    write("Type a text for the model to go on with; /help for more, Ctrl-D leaves.\n")
    with _quiet_terminal():
        while True:
            try:
                line = prompt.prompt("> ")
            except KeyboardInterrupt:
                write("(Ctrl-D or 'exit' leaves)\n")
                continue
            except EOFError:
                return 0
            if leaves(line):
                return 0
            try:
                _take(session, line, as_json, interactive=True)
            except UserError as error:
                write(f"error: {error}\n")
            except KeyboardInterrupt:
                write("(stopped)\n")


def _take(session: Session, line: str, as_json: bool, interactive: bool) -> None:
    if not line.strip():
        return
    if is_command(line):
        if line.split()[0].lower() != "/more":
            shown = run_command_line(session, line)
            # What a command says is no answer: from a pipe it goes where messages go.
            (sys.stdout if interactive else sys.stderr).write(shown)
            return
        line = more_prompt(session)
    if as_json:
        for _ in session.answer(line):
            pass
        print(json.dumps(session.last.as_dict(), ensure_ascii=False), flush=True)
        return
    if interactive:
        _stream(session, line)
        return
    for piece, _ in session.answer(line):  # Ctrl-C ends the program: nobody is there to go on
        write(piece)
    write("\n")
    explain_end(session.last, session)


def _stream(session: Session, prompt: str) -> None:
    """An answer at the terminal, piece by piece; Ctrl-C stops it alone."""
    stream = session.answer(prompt)
    interrupted = False
    with contextlib.closing(stream), _interrupt() as asked:
        try:
            for piece, _ in stream:
                write(piece)
                if asked:
                    interrupted = True
                    break
        except KeyboardInterrupt:
            interrupted = True
    write("\n")
    if interrupted:
        write("(stopped)\n")
    else:
        explain_end(session.last, session, file=sys.stdout)


@contextlib.contextmanager
def _interrupt() -> Iterator[list]:
    """Within: the first Ctrl-C fills the list, to be looked at between tokens; the second raises."""
    asked: list[int] = []

    def note(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet_terminal() -> Iterator[None]:
    """While an answer streams, what is typed is not echoed into it and is kept whole for the next prompt.

    In the terminal's line mode the kernel would cut a typed-ahead line at 4096 bytes and swallow Ctrl-D.
    Ctrl-C still signals. The line editor sets its own mode and comes back to this one.
    """
    try:
        import termios
    except ImportError:  # no such terminals on this system
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _history_file() -> Path | None:
    """Where earlier texts are kept: $XDG_STATE_HOME/aquila/history; None when that cannot be written."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "aquila" / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except (OSError, RuntimeError):
        return None
    return file
