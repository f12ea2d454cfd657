"""A configuration as a person reads it: the whole table, and the start-up summary.

*Free*: the words may change; tests hold the size of the summary and what stands in it.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SUMMARY_LINES = 20
_EVERYTHING = "all keys: --dry-run, or effective_config.yaml in the run's folder"
_LONGEST_VALUE = 48


class Setting(Protocol):
    @property
    def value(self) -> Any: ...
    @property
    def source(self) -> str: ...


History = Mapping[str, Sequence[Setting]]
"""For each key every value that was given, the default first and the winner last."""


def show(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def overridden(settings: Sequence[Setting]) -> list[Setting]:
    """What lost against another value that someone had written down; a default is no loss."""
    return [s for s in settings[:-1] if s.source != "default" and s.value != settings[-1].value]


def table(history: History, tail: Sequence[str], width: int | None = None) -> str:
    """Key, value, source and what it overrode, then the lines of `tail`.

    width: of the terminal; what is longer goes on in the next line, indented. None: a line a key.
    """
    rows = [("key", "value", "source", "overrides")]
    for key, settings in history.items():
        lost = "; ".join(f"{s.value} ({s.source})" for s in overridden(settings))
        rows.append((key, show(settings[-1].value), settings[-1].source, lost))
    if width is None:
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join([*lines, *tail])
    first = max(len(row[0]) for row in rows) + 2
    lines = [_fold(f"{'key':<{first}}value  (source; what it overrides)", width, first), "-" * width]
    for key, value, source, lost in rows[1:]:
        why = f"({source}{'; overrides ' + lost if lost else ''})"
        lines.append(_fold(f"{key:<{first}}{value}  {why}", width, first))
    return "\n".join([*lines, *(_fold(line, width, 2) for line in tail)])


def summary(title: str, history: History, notes: Sequence[str], width: int = 80) -> str:
    """At most `SUMMARY_LINES` lines of `width`: what differs from the defaults, and what was overridden."""
    lines = [cut(title, width), *_by_source(history, width)]
    lost = [
        f"{key}={_value(settings[-1])} ({_file(settings[-1])}) overrides "
        + ", ".join(f"{show(s.value)} ({_file(s)})" for s in overridden(settings))
        for key, settings in history.items()
        if overridden(settings)
    ]
    remarks = [f"note: {note}" for note in notes]
    room = SUMMARY_LINES - 1 - len(lines)
    kept = _fit(lost, max(room - min(len(remarks), 4), 1))
    kept += _fit(remarks, room - len(kept))
    return "\n".join([*lines, *(cut(line, width) for line in kept), _EVERYTHING])


def _by_source(history: History, width: int, most: int = 10) -> list[str]:
    """'file  key=value key=value' of the keys that differ from their default, the strongest source first."""
    groups: dict[str, list[str]] = {}
    for key, settings in history.items():
        if settings[-1].value != settings[0].value:
            groups.setdefault(_file(settings[-1]), []).append(f"{key}={_value(settings[-1])}")
    names = sorted(groups, key=lambda name: (name != "command line", name.endswith(".json"), name))
    column = min(max(map(len, names), default=0) + 2, width // 3)
    lines: list[str] = []
    for name in names:
        lines += textwrap.wrap(
            "\0".join(groups[name]).replace(" ", "\1").replace("\0", " "),  # a value is never torn
            width,
            initial_indent=f"  {cut(name, column - 2):<{column}}",
            subsequent_indent=" " * (column + 2),
            break_on_hyphens=False,
        )
    return [line.replace("\1", " ") for line in _fit(lines, most)]


def _fit(lines: list[str], most: int) -> list[str]:
    if len(lines) <= max(most, 0):
        return lines
    kept = lines[: max(most - 1, 0)]
    return [*kept, f"  ... {len(lines) - len(kept)} more lines of this kind"] if most > 0 else []


def _value(setting: Setting) -> str:
    return cut(show(setting.value), _LONGEST_VALUE)


def _file(setting: Setting) -> str:
    """'deepspeed.json optimizer.params.lr' to 'deepspeed.json'."""
    source = setting.source
    return source.split()[0] if source.split()[0].endswith((".json", ".yaml", ".yml")) else source


def cut(text: str, width: int) -> str:
    """`text` in one line of `width`; what was left out shows as an ellipsis."""
    return text if len(text) <= width else text[: width - 3] + "..."


def _fold(line: str, width: int, indent: int) -> str:
    return "\n".join(textwrap.wrap(line, width, subsequent_indent=" " * indent, break_on_hyphens=False))
