"""Trains and generates, each in a copy of one process: libraries take longer to load than small runs.

    python runs.py '[["pretrain", ARGUMENTS...], ["/path/to/generate.py", ARGUMENTS...], ...]' PORT...

A port a command. Prints `status N S` after command number N; ends with the first that fails.
"""

import atexit
import json
import os
import runpy
import sys
import traceback

import deepspeed  # noqa: F401, loaded once for all

from aquila import pretrain
from aquila.core.errors import EXIT_STOPPED


def run(command: list[str]) -> int:
    """The exit status of `aquila.pretrain`, or of the program at a path."""
    sys.argv = command
    try:
        if command[0] == "pretrain":
            return pretrain.main()
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(status: int) -> None:
    """Ends this process, but does not take apart what it shares with its parent: that takes a second."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    pretrain.RunLog.draw = lambda log: None  # pictures would take most of the time
    for number, (command, port) in enumerate(zip(json.loads(sys.argv[1]), sys.argv[2:], strict=True)):
        os.environ["MASTER_PORT"] = port
        child = os.fork()
        if not child:
            end(run(command))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"status {number} {status}", flush=True)
        if status not in (0, EXIT_STOPPED):
            sys.exit(1)
