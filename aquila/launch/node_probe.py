"""What an agent finds out about its node for the preflight; it leaves nothing behind."""

import contextlib
import hashlib
import os
import shutil
import socket
import uuid
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aquila.core.errors import UserError
from aquila.launch import toolkit
from aquila.launch.device_probe import probe_devices
from aquila.launch.fabric import probe_fabric

_SMALL = 32 << 20
_ENDS = 1 << 20
TOKEN_PREFIX = ".aquila-preflight-"


def fingerprint(path: Path) -> str | None:
    """A name for the content of a file or a folder's files, None when there is none.

    Large files by their size, beginning and end: two downloads of one file agree, a broken one does not.
    """
    if path.is_dir():
        digest = hashlib.sha256()
        for member in sorted(path.rglob("*")):
            if member.is_file():
                digest.update(f"{member.relative_to(path)} {fingerprint(member)}\n".encode())
        return digest.hexdigest()[:16]
    if not path.is_file():
        return None
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _SMALL:
            digest.update(file.read())
        else:
            digest.update(file.read(_ENDS))
            file.seek(-_ENDS, os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def existing_parent(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


class NodeProbe(ABC):
    """The questions of the preflight, as requests to an agent. Mixed into `agent.Agent`."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None
        self.token: Path | None = None

    @abstractmethod
    def send(self, event: str, **fields: Any) -> None:
        """As `agent.Agent.send`."""

    def on_probe(
        self, paths: list[str], output: str, devices: bool, slots: int, environment: dict[str, str]
    ) -> None:
        """Devices and versions, their network, fingerprints of `paths`, room under `output`.

        `environment`: the head node's, for what this node has not set itself.
        """
        toolkit.set_up(environment)
        place = existing_parent(Path(output))
        answer: dict[str, Any] = {
            "fingerprints": {path: fingerprint(Path(path)) for path in paths},
            "free": shutil.disk_usage(place).free,
            "writable": os.access(place, os.W_OK),
            "fabric": probe_fabric(slots),
        }
        try:
            if devices:
                answer["devices"] = probe_devices()
        except UserError as error:
            answer["problem"] = str(error)
        self.send("probed", **answer)

    def on_listen(self, address: str) -> None:
        """Opens a port on the node's address for the other nodes to try."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self.listener = socket.create_server((address, 0), family=family, backlog=256)
        except OSError as error:
            self.send("listening", port=None, problem=error.strerror)
            return
        self.send("listening", port=self.listener.getsockname()[1])

    def on_reach(self, others: list[tuple[str, int]], timeout: float) -> None:
        """Which of the others' ports this node cannot connect to."""

        def problem(target: tuple[str, int]) -> str | None:
            host, port = target
            try:
                socket.create_connection((host, port), timeout).close()
            except OSError as error:
                return error.strerror or str(error)
            return None

        with ThreadPoolExecutor(max(1, min(64, len(others)))) as pool:
            found = dict(zip([host for host, _ in others], pool.map(problem, others), strict=True))
        self.send("reached", problems={host: text for host, text in found.items() if text})

    def on_write_token(self, folder: str) -> None:
        """Writes a file of random name under `folder`, or its nearest existing parent."""
        token = existing_parent(Path(folder)) / f"{TOKEN_PREFIX}{uuid.uuid4().hex}"
        try:
            token.touch(exist_ok=False)
        except OSError as error:
            self.send("token", path=None, problem=f"{token.parent}: {error.strerror}")
            return
        self.token = token
        self.send("token", path=str(token))

    def on_read_token(self, path: str) -> None:
        with contextlib.suppress(OSError):
            os.listdir(Path(path).parent)  # a network disk's list of names may be some seconds old
        self.send("token_read", found=Path(path).exists())

    def forget(self) -> None:
        """Removes what the questions left."""
        if self.token:
            self.token.unlink(missing_ok=True)
            self.token = None
        if self.listener:
            self.listener.close()
            self.listener = None
