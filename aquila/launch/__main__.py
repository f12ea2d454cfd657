"""`python -m aquila.launch local|dist|stop|dist-stop ...`: what the shell scripts call."""

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path

from aquila.config.compare import settings_of
from aquila.core.errors import UserError, run_command
from aquila.core.paths import find_config_argument, find_file
from aquila.core.run_folder import check_experiment
from aquila.launch.copying import copy_to_nodes
from aquila.launch.display import width_of
from aquila.launch.launcher import launch
from aquila.launch.nodes import forwarded_environment, is_this_node
from aquila.launch.status import show_status
from aquila.launch.stop import stop_here, stop_nodes
from aquila.preflight.hosts import check_hosts, connect_hosts
from aquila.preflight.local import WARN, PreflightReport, check_run

TRIGGER = {"local": "scripts/local_trigger_docker.sh", "dist": "scripts/dist_trigger_docker.sh"}


def main() -> int:
    arguments = _parse()
    if arguments.command == "stop":
        return stop_here(check_experiment(arguments.experiment))
    if arguments.command == "status":
        return show_status(check_experiment(arguments.experiment), arguments.json, arguments.watch)
    if arguments.command == "dist-stop":
        return stop_nodes(find_file(arguments.hostfile), check_experiment(arguments.experiment))
    return trigger(arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m aquila.launch", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, script in TRIGGER.items():
        sub = commands.add_parser(command, prog=f"bash {script}", allow_abbrev=False)
        sub.add_argument("hostfile", help="one node per line: host slots=N")
        sub.add_argument("config", help="YAML file; a bare name is looked for in configs/")
        sub.add_argument("model", help="a folder under checkpoints_in/")
        sub.add_argument("experiment", help="name of the folder under checkpoints_out/")
        sub.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="override the YAML file"
        )
        sub.add_argument("--wait", action="store_true", help="stay until training ends, return its status")
        sub.add_argument("--dry-run", action="store_true", help="print the configuration, start nothing")
        sub.add_argument(
            "--no-preflight",
            action="store_true",
            help="go on in spite of what they find",
        )
    stop = commands.add_parser("stop", prog="bash scripts/local_stop_docker.sh", allow_abbrev=False)
    stop.add_argument("experiment", help="name of the folder under checkpoints_out/")
    status = commands.add_parser("status", prog="bash scripts/status.sh", allow_abbrev=False)
    status.add_argument("experiment", help="name of the folder under checkpoints_out/")
    status.add_argument("--json", action="store_true", help="one JSON object instead of text")
    status.add_argument("--watch", action="store_true", help="again every 2 s, until the run ends or Ctrl-C")
    stop = commands.add_parser("dist-stop", prog="bash scripts/dist_stop_docker.sh", allow_abbrev=False)
    stop.add_argument("hostfile", help="one node per line: host slots=N")
    stop.add_argument("experiment", help="name of the folder under checkpoints_out/")
    # Flags may stand between the overrides, which argparse's sub-commands do not allow by themselves.
    words = sys.argv[1:]
    flags = [word for word in words if word.startswith("-") and "=" not in word]
    others = [word for word in words if word not in flags]
    arguments = parser.parse_args([*others[:1], *flags, *others[1:]])
    for word in getattr(arguments, "overrides", []):
        if "=" not in word:
            raise UserError(f"'{word}' on the command line: overrides have the form key=value")
    return arguments


def trigger(arguments: argparse.Namespace) -> int:
    """Checks everything, then starts the run."""
    local = arguments.command == "local"
    experiment = check_experiment(arguments.experiment)
    config = find_config_argument(arguments.config)
    hostfile = find_file(arguments.hostfile)
    hosts_too = not local and not arguments.no_preflight and not arguments.dry_run
    differing: dict[str, list[Path]] = {}
    with connect_hosts(hostfile) if hosts_too else contextlib.nullcontext() as group:
        checked = check_run(
            hostfile,
            config,
            arguments.model,
            arguments.overrides,
            local=local,
            experiment=experiment,
            starts=not arguments.dry_run,
        )
        if group and not checked.failures:
            differing = check_hosts(checked, group)
    if arguments.no_preflight or arguments.dry_run:
        checked.downgrade(keep={"hostfile", "this node", "devices", "configuration"})
    checked.raise_failures()
    for finding in checked.findings:
        if finding.state == WARN:
            print(f"warning: {finding.check}: {finding.detail}", file=sys.stderr)
    if arguments.dry_run:
        print(checked.config.table(width_of(sys.stdout)))
        return 0
    print(checked.config.summary(), flush=True)
    for host, paths in differing.items():
        print(f"copying to {host}: {', '.join(map(str, paths))}", flush=True)
    copy_to_nodes(differing)
    return launch(
        _request(arguments, checked, experiment, config),
        wait=arguments.wait,
        total_steps=checked.config.run.train_iters,
    )


def _request(arguments: argparse.Namespace, checked: PreflightReport, experiment: str, config: str) -> dict:
    local = arguments.command == "local"
    run = checked.config.run
    nodes = [checked.here] if local and checked.here else checked.nodes
    stop = (
        f"bash scripts/local_stop_docker.sh {experiment}"
        if local
        else f"bash scripts/dist_stop_docker.sh {shlex.quote(arguments.hostfile)} {experiment}"
    )
    return {
        "nodes": [
            {"host": node.host, "slots": node.slots, "here": local or is_this_node(node.host)}
            for node in nodes
        ],
        "experiment": experiment,
        "resume": run.resume,
        "command": [sys.executable, "-m", "aquila.pretrain"],
        "arguments": [config, arguments.model, experiment, *arguments.overrides],
        "environment": forwarded_environment(),
        "settings": json.dumps(settings_of(checked.config)),
        "node_timeout": run.node_timeout,
        "rejoin_timeout": run.rejoin_timeout,
        "max_restarts": run.max_restarts,
        "min_nodes": run.min_nodes,
        "stop_command": stop,
    }


if __name__ == "__main__":
    run_command(main)
