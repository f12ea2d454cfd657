"""Configuration and model folder to the nodes that lack them, where no disk is shared."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aquila.core.errors import UserError
from aquila.launch.channel import on_host

# Into a folder beside the target, then renamed: nothing half-copied is ever taken for whole.
_RECEIVE = (
    'mkdir -p "$(dirname "$1")" && rm -rf "$1.copying" && mkdir "$1.copying" && '
    'tar -C "$1.copying" -xf - && rm -rf "$1" && mv "$1.copying/$2" "$1" && rm -rf "$1.copying"'
)


def copy_to_nodes(wanted: dict[str, list[Path]]) -> None:
    """Copies each host's list of files and folders there, to the same path. Raises `UserError`."""
    jobs = [(host, path) for host, paths in wanted.items() for path in paths]
    with ThreadPoolExecutor(max(1, min(16, len(jobs)))) as pool:
        problems = [text for text in pool.map(lambda job: _copy(*job), jobs) if text]
    if problems:
        raise UserError("\n  ".join(problems))


def _copy(host: str, path: Path) -> str | None:
    receive = ["sh", "-c", _RECEIVE, "sh", str(path), path.name]
    pack = subprocess.Popen(
        ["tar", "-C", str(path.parent), "-cf", "-", "--", path.name],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert pack.stdout is not None
    unpack = subprocess.run(
        on_host(host, receive),
        stdin=pack.stdout, capture_output=True, text=True,
    )  # fmt: skip
    pack.stdout.close()
    packing = pack.communicate()[1].decode("utf-8", errors="replace")
    if unpack.returncode or pack.returncode:
        return f"{host}: {path} could not be copied there: {(unpack.stderr or packing).strip()}"
    return None
