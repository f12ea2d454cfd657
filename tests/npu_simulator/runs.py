"""Trains and generates several times in one process, whose libraries take longer to load than the runs.

    python runs.py '[["pretrain", ARGUMENTS...], ["generate", ARGUMENTS...], ...]' PORT...

A port a command. Prints `status N S` after command number N; ends with the first that fails.
"""

import json
import os
import runpy
import sys

from aquila import pretrain
from aquila.core.errors import EXIT_STOPPED


def run(command: list[str]) -> int:
    """The exit status of `aquila.pretrain`'s or `generate.py`'s main function."""
    sys.argv = command
    if command[0] == "pretrain":
        return pretrain.main()
    try:
        runpy.run_path("generate.py", run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    for number, (command, port) in enumerate(zip(json.loads(sys.argv[1]), sys.argv[2:], strict=True)):
        os.environ["MASTER_PORT"] = port
        status = run(command)
        print(f"status {number} {status}", flush=True)
        if status not in (0, EXIT_STOPPED):
            sys.exit(status)
