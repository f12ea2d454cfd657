"""Finds every mistake before a single rank starts.

    python -m aquila.preflight HOSTFILE CONFIG.yaml MODEL [key=value ...]

Prints one table of what passed, what deserves a look and what fails, each failure with its remedy.
Starts nothing and leaves nothing behind. Exit status: 0 when nothing fails, else 2.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table

from aquila.core.errors import EXIT_USER_ERROR, run_command
from aquila.core.paths import find_config_argument, find_file
from aquila.preflight.hosts import check_hosts, connect_hosts
from aquila.preflight.local import FAIL, PASS, WARN, PreflightReport, check_run

STYLES = {PASS: "green", WARN: "yellow", FAIL: "bold red"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m aquila.preflight", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("hostfile", help="one node per line: host slots=N")
    parser.add_argument("config", help="YAML file; a bare name is looked for in configs/")
    parser.add_argument("model", help="a folder under checkpoints_in/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="override the YAML file"
    )
    arguments = parser.parse_args()
    hostfile = find_file(arguments.hostfile)
    with connect_hosts(hostfile) as group:
        config = find_config_argument(arguments.config)
        checked = check_run(hostfile, config, arguments.model, arguments.overrides, local=False)
        if group and checked.nodes:
            check_hosts(checked, group)
    show(checked)
    return EXIT_USER_ERROR if checked.failures else 0


def show(checked: PreflightReport) -> None:
    """The table; without a terminal, one row a line, not cut at any width."""
    console = Console(highlight=False)
    if not console.is_terminal:
        width = max(len(finding.check) for finding in checked.findings)
        for finding in checked.findings:
            print(f"{finding.state:4}  {finding.check.ljust(width)}  {finding.detail}")
    else:
        table = Table("", "check", "what was found", show_lines=False)
        for finding in checked.findings:
            table.add_row(f"[{STYLES[finding.state]}]{finding.state}", finding.check, finding.detail)
        console.print(table)
    failures = len(checked.failures)
    verdict = f"{failures} check(s) failed: nothing would start" if failures else "ready to start"
    print(verdict, file=sys.stderr if failures else sys.stdout)


if __name__ == "__main__":
    run_command(main)
