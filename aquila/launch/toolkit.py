"""The NPU vendor's software on this machine: CANN's environment, its version, and what goes with what."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

HOME = "ASCEND_HOME_PATH"
"""Set by CANN's set_env.sh: where CANN lies."""
SET_ENV = "AQUILA_CANN_SET_ENV"
"""A variable that names set_env.sh where it is not in one of `PLACES`."""
PLACES = (
    "/usr/local/Ascend/cann/set_env.sh",
    "/usr/local/Ascend/ascend-toolkit/set_env.sh",
    "~/Ascend/cann/set_env.sh",
    "~/Ascend/ascend-toolkit/set_env.sh",
)
"""Where CANN's installers put it: from 8.5 on, before, and for a user who is not root."""
DRIVER = "/usr/local/Ascend/driver/lib64"
_PAIRS = Path(__file__).with_name("npu_pairs.txt")


class Pair(NamedTuple):
    """Releases that go together; `cann` is "-" where the vendor's table has none yet."""

    torch: str
    torch_npu: str
    cann: str


def set_up(given: Mapping[str, str] | None = None) -> None:
    """Completes this process's environment, for what it starts.

    CANN's variables first, where they are not set and its set_env.sh is found: a shell over ssh reads no
    profile. Then those of `given`, the head node's, that this machine has not set itself.
    """
    given = given or {}
    if HOME not in os.environ and (script := find_set_env(given)):
        os.environ.update(_sourced(script))
        paths = [f"{DRIVER}/{part}" for part in ("common", "driver") if Path(DRIVER, part).is_dir()]
        known = os.environ.get("LD_LIBRARY_PATH", "").split(":")
        added = [path for path in paths if path not in known]
        if added:
            os.environ["LD_LIBRARY_PATH"] = ":".join(filter(None, [*known, *added]))
    for key, value in given.items():
        os.environ.setdefault(key, value)


def find_set_env(given: Mapping[str, str] | None = None) -> Path | None:
    """CANN's set_env.sh: the one that the user names, here or on the head node, else an installer's."""
    named = os.environ.get(SET_ENV) or (given or {}).get(SET_ENV)
    places = (named,) if named else PLACES
    return next((path for path in (Path(place).expanduser() for place in places) if path.is_file()), None)


def _sourced(script: Path) -> dict[str, str]:
    """The environment after a shell has read `script`; as it was when that fails or takes too long."""
    try:
        done = subprocess.run(
            ["bash", "-c", 'source "$1" >/dev/null 2>&1; exec env -0', "bash", str(script)],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    entries = (entry.partition("=") for entry in os.fsdecode(done.stdout).split("\0") if "=" in entry)
    return {name: value for name, _, value in entries if name not in ("_", "SHLVL", "PWD", "OLDPWD")}


def cann_version(home: str | None = None) -> str | None:
    """'8.3.RC1' from the files of the CANN at `home` (default: the environment's), None when not found."""
    home = home or os.environ.get(HOME)
    if not home:
        return None
    patterns = (
        ("ascend_toolkit_install.info", r"^version=(\d+\.\d+\S*)"),
        ("version.cfg", r":(\d+\.\d+[^\]\s]*)\]"),
        ("version.info", r"^[Vv]ersion=(\d+\.\d+\S*)"),
    )
    for name, pattern in patterns:
        for path in (Path(home, name), *sorted(Path(home).glob(f"*/{name}"))):
            if path.is_file() and (found := re.search(pattern, path.read_text(errors="replace"), re.M)):
                return found[1]
    return None


def pairs() -> list[Pair]:
    """The vendor's table, newest first."""
    lines = _PAIRS.read_text(encoding="utf-8").splitlines()
    return [Pair(*line.split()) for line in lines if line and not line.startswith("#")]


def pair_problem(torch_npu: str, cann: str | None) -> str | None:
    """What is wrong with this torch_npu beside this CANN, and which pair fits; None when nothing is known."""
    made_for = next((pair.cann for pair in pairs() if pair.torch_npu == torch_npu.split("+")[0]), "-")
    if cann is None or made_for == "-" or _release(cann) >= _release(made_for):
        return None
    return f"torch_npu {torch_npu} is made for CANN {made_for}, and here is CANN {cann}; {fitting(cann)}"


def fitting(cann: str | None) -> str:
    """The vendor's pair for this CANN, in words."""
    fits = next((p for p in pairs() if cann and p.cann != "-" and _release(p.cann) == _release(cann)), None)
    if fits is None:
        return "docs/npu.md lists the vendor's pairs of CANN, torch and torch_npu"
    return f"the vendor's pair for this CANN is torch {fits.torch} with torch_npu {fits.torch_npu}"


def _release(version: str) -> tuple[int, ...]:
    """'8.3.RC1' to (8, 3)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
