"""What goes to the terminal: answers as they come, without anything that could steer it."""

import re
import sys

# A model can write escape sequences; a terminal would obey them. Tab and newline stay.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write(text: str) -> None:
    """Writes a piece of an answer at once; on a terminal without control characters."""
    if sys.stdout.isatty():
        text = _CONTROL.sub("", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def use_utf8() -> None:
    """Standard streams as UTF-8 whatever the locale; what cannot be encoded is replaced.

    Bytes of the input that are no UTF-8 stay recognizable (`not_utf8`), to be refused.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else "replace"
            )


def not_utf8(line: str) -> bool:
    """Whether a line of the input held bytes that are no UTF-8."""
    return any("\udc80" <= letter <= "\udcff" for letter in line)
