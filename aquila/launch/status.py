"""`scripts/status.sh EXP`: what an experiment does now, node by node."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from aquila.config.show import cut
from aquila.core import run_folder
from aquila.core.checkpoints import FOLDER, list_checkpoints
from aquila.core.errors import UserError
from aquila.core.jsonl import last_lines
from aquila.core.paths import ROOT
from aquila.launch.display import describe, is_terminal
from aquila.launch.stop import running_agents

STALE = 30.0
"""Seconds after which a controller that writes nothing counts as gone."""


WATCH_INTERVAL = 2.0


def show_status(experiment: str, as_json: bool = False, watch: bool = False, root: Path = ROOT) -> int:
    """Prints the newest version's state; 0 when it runs or has ended well, else its exit status.

    watch: again every few seconds, until the run has ended or Ctrl-C.
    """
    drawn = 0
    while True:
        found = snapshot(experiment, root)
        lines = [json.dumps(found, ensure_ascii=False)] if as_json else in_words(found)
        if watch and is_terminal(sys.stdout):
            size = shutil.get_terminal_size()
            lines = [cut(line, size.columns - 1) for line in lines[: size.lines - 1]]
            back = f"\x1b[{drawn}A\r" if drawn else ""
            sys.stdout.write(back + "".join(f"\x1b[K{line}\n" for line in lines) + "\x1b[J")
        else:
            sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        drawn = len(lines)
        if not watch or found["state"] != "running":
            return found["exit_status"]
        try:
            time.sleep(WATCH_INTERVAL)
        except KeyboardInterrupt:
            return 0


def snapshot(experiment: str, root: Path = ROOT) -> dict[str, Any]:
    """The newest version's state as one object: what `--json` prints. Raises `UserError` without one.

    state: running, done, stopped, failed or gone; exit_status: of the status command; nodes: host, slots,
    state of each; metric: the last record of metrics.jsonl; failure: the rank that failed first.
    """
    folder = run_folder.experiment_dir(root, experiment)
    run_dir = run_folder.newest_launch(folder)
    if run_dir is None:
        others = sorted(path.parent.parent.name for path in root.glob("checkpoints_out/*/*/launch"))
        known = f"; there are: {', '.join(dict.fromkeys(others))}" if others else ""
        raise UserError(f"no launch of '{experiment}' under {root / 'checkpoints_out'}{known}")
    told = run_folder.read_json(run_dir / run_folder.STATUS) or {}
    words, status = overall(told, bool(running_agents(experiment, root)))
    metrics = last_lines(run_dir / "metrics.jsonl", 1)
    checkpoints = list_checkpoints(run_dir / FOLDER)
    return {
        "experiment": experiment,
        "version": run_dir.name,
        "run_dir": str(run_dir),
        "state": words.split()[0].strip(",:"),
        "words": words,
        "exit_status": status,
        "restarts": told.get("restarts", 0),
        "metric": metrics[-1] if metrics else told.get("metric") or None,
        "checkpoint": checkpoints[-1].name if checkpoints else None,
        "checkpoint_age_seconds": round(time.time() - checkpoints[-1].stat().st_mtime)
        if checkpoints
        else None,
        "nodes": [
            {"host": node["host"], "slots": node["slots"], "state": node_state(node, told)}
            for node in told.get("nodes", [])
        ],
        "failure": told.get("record"),
        "logs": str(run_dir / "logs"),
    }


def in_words(found: dict[str, Any]) -> list[str]:
    """A snapshot as lines for a person."""
    lines = [f"{found['experiment']}/{found['version']}: {found['words']}"]
    lines += [f"  {line}" for line in details(found)]
    lines += [f"  {node['host']}: {node['state']}, {node['slots']} slot(s)" for node in found["nodes"]]
    if record := found["failure"]:
        lines.append(f"  rank {record['rank']} on {record['node']} failed first: {record['log']}")
        lines += [f"    {line}" for line in record.get("error", "").splitlines()[-5:]]
    return lines


def overall(told: dict[str, Any], agent_here: bool) -> tuple[str, int]:
    """The run in words, and the exit status that goes with them."""
    age = time.time() - told.get("time", 0)
    if told.get("state") == "ended":
        status = told.get("status") or 0
        words = {0: "done", 75: "stopped, checkpoint saved"}
        return (
            f"{words.get(status, 'failed')} (exit status {status}) {ago(age)}",
            0 if status == 75 else status,
        )
    if age > STALE and not agent_here:
        return f"gone: no word from its controller for {age:.0f} s", 1
    again = f", restart {told['restarts']}" if told.get("restarts") else ""
    return f"running{again}", 0


def node_state(node: dict[str, Any], told: dict[str, Any]) -> str:
    if node["lost"] and not node["alive"]:
        return f"lost ({node['lost']})"
    if told.get("state") == "ended":
        return "not running"
    return "running" if node["running"] else "waiting"


def details(found: dict[str, Any]) -> list[str]:
    """Step and speed, the newest checkpoint, the slowest rank."""
    metric = found["metric"] or {}
    lines = [describe(metric)] if metric else ["no step logged yet"]
    if (slowest := metric.get("slowest_rank")) is not None:
        lines.append(f"slowest rank: {slowest}")
    if found["checkpoint"]:
        lines.append(f"last checkpoint: {found['checkpoint']}, {ago(found['checkpoint_age_seconds'])}")
    else:
        lines.append("last checkpoint: none yet")
    lines.append(f"logs: {found['logs']}")
    return lines


def ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
