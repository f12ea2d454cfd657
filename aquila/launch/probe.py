"""What this machine's Python can do for a run. Asked in its own process: torch takes seconds to import."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

from aquila.errors import UserError
from aquila.launch.code import ROOT

# Says which import fails, rather than failing: a broken vendor stack is what a probe is for.
_PROBE = """
import json
from aquila.backend import detect, get_backend
kind = detect()
backend = get_backend(kind)
print("\\nAQUILA-PROBE " + json.dumps({
    "device": kind,
    "count": backend.device_count(),
    "name": backend.device_name(),
    "precisions": list(backend.supported_precisions()),
}))
"""


@lru_cache(maxsize=1)
def probe_devices(timeout: float = 120.0) -> dict[str, Any]:
    """Device type, count, name and precisions of this machine: keys device, count, name, precisions.

    Raises `UserError` with Python's own error when torch or the device's library cannot be loaded.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UserError(f"looking for devices took longer than {timeout:.0f} s; is a device hung?") from None
    for line in done.stdout.splitlines():
        if line.startswith("AQUILA-PROBE "):
            return json.loads(line.removeprefix("AQUILA-PROBE "))
    last = done.stderr.strip().splitlines()[-1:] or ["(no message)"]
    raise UserError(f"{sys.executable} cannot load torch and its device: {last[0]}")
