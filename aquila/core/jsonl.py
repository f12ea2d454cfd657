"""JSON lines that another process writes: what is whole is read, what is not is left out."""

from pathlib import Path
from typing import Any

from aquila.core.text_files import parse_json


def objects(data: bytes) -> list[dict[str, Any]]:
    """The objects of these lines; lines that are none, such as one cut short by a crash, are left out."""
    found = []
    for line in data.splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


class JsonlTail:
    """New whole lines of a JSON-lines file that another process appends to; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def new_lines(self) -> list[dict[str, Any]]:
        """The objects appended since the last call. A line still being written waits for its end."""
        try:
            size = self.path.stat().st_size
            # Smaller than before: a resumed run has cut it back to its checkpoint; what is left is old.
            self.position = min(self.position, size)
            if size == self.position:
                return []
            with self.path.open("rb") as file:
                file.seek(self.position)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.position += len(whole)
        return objects(whole)


def last_lines(path: Path, count: int, reach: int = 64 * 1024) -> list[dict[str, Any]]:
    """The last whole objects of a JSON-lines file, none when there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - reach))
            lines = file.read().splitlines()[-count - 1 :]
    except OSError:
        return []
    return objects(b"\n".join(lines))[-count:]
