"""Three things to try when a rank has failed, by what its error says.

*Free*: one table, first match first. *Guarded by* `tests/unit/launch/test_advice.py`.
"""

import re
import signal
from typing import Any, NamedTuple

from aquila.core.errors import EXIT_USER_ERROR


class Advice(NamedTuple):
    name: str
    pattern: str
    """Looked for in the error's text."""
    steps: tuple[str, str, str]


ADVICE = (
    Advice(
        "out of memory",
        r"out of memory|OutOfMemoryError|killed by SIGKILL|can't allocate memory|cannot allocate memory",
        (
            "python -m aquila.plan MODEL --devices N --memory SIZE: what fits, and with which keys",
            "batch_size=1 with more gradient_accumulation_steps, ckpoint_layer=-1, or zero_stage=3",
            "where the host's memory ran out (dmesg names the process): fewer slots, or "
            "background_save=False, which keeps no second copy of the state",
        ),
    ),
    Advice(
        "a rank stands still",
        r"stood still|hang_timeout|Watchdog caught collective|Timeout\(ms\)|timed out waiting",
        (
            "the end of every file in logs/: each rank wrote there where it stood",
            "python -m aquila.accept on the node of the rank that is named: is its device healthy?",
            "a larger hang_timeout, where one step or one save truly takes that long",
        ),
    ),
    Advice(
        "connection",
        r"Connection (closed|reset|refused)|Broken pipe|Socket Timeout|connectFullMesh|DistNetworkError|"
        r"DistStoreError|No route to host|Address already in use|Gloo connect",
        (
            "bash scripts/status.sh EXP: is another node lost? Then that one's log has the cause",
            "python -m aquila.preflight HOSTFILE CONFIG MODEL: do the nodes reach one another?",
            "several networks on a host: name the interface in GLOO_SOCKET_IFNAME (and in that of the "
            "device's own library), then start again",
        ),
    ),
    Advice(
        "not finite",
        r"not finite|max_bad_steps|[Nn]a[Nn] (loss|gradient)|loss scale",
        (
            "the documents that the log names: look at them with data_tools.inspect_dataset",
            "a lower lr, a longer warm_up, or precision=fp32 to see whether the numbers are at fault",
            "skip_spikes=3 leaves out single bad batches; resume=PATH goes back to an earlier checkpoint",
        ),
    ),
    Advice(
        "device",
        r"device-side assert|illegal memory access|uncorrectable|ECC error|aicore|weights of rank\(s\)|"
        r"unhandled .* error|ERR0\d{4}|EZ9999|EE9999",
        (
            "python -m aquila.accept on that node: does the device still compute what it should?",
            "python -m data_tools.verify_dataset DATA: an id outside of the vocabulary fails like this",
            "take the node out of the hostfile; the same command goes on from the newest checkpoint",
        ),
    ),
    Advice(
        "disk",
        r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error",
        (
            "df -h checkpoints_out: free space, or keep_checkpoints=3 to keep only the newest",
            "the same command afterwards: it goes on from the newest whole checkpoint",
            "python -m aquila.preflight HOSTFILE CONFIG MODEL: it compares free space with what is needed",
        ),
    ),
    Advice(
        "missing package",
        r"ModuleNotFoundError|ImportError|undefined symbol|cannot open shared object",
        (
            "bash scripts/install.sh on the node that is named: it makes or mends .venv",
            "python -m aquila.preflight HOSTFILE CONFIG MODEL: it compares the packages of all nodes",
            "on a machine with a vendor's image: build .venv on its Python, see docs/devices.md",
        ),
    ),
)
USER = Advice(
    "the input",
    "",
    (
        "mend what the message names: the key, the file or the folder",
        "the same command with --dry-run: every key, its source, and what it overrode",
        "python -m aquila.preflight HOSTFILE CONFIG MODEL: all checks, without starting a rank",
    ),
)
OTHER = Advice(
    "anything else",
    "",
    (
        "the whole log, and those of the other ranks beside it: the first error counts",
        "the same command again: it goes on from the newest checkpoint (max_restarts=3 does it by itself)",
        "python -m aquila.accept: are installation and device in order?",
    ),
)


def advice(record: dict[str, Any]) -> Advice:
    """What to try after this record of a failed rank."""
    if record["status"] == EXIT_USER_ERROR:
        return USER
    text = record.get("error", "") + (" killed by SIGKILL" if record["status"] == -signal.SIGKILL else "")
    return next((entry for entry in ADVICE if re.search(entry.pattern, text)), OTHER)
