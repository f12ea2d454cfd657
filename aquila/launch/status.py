"""`scripts/status.sh EXP`: what an experiment does now, node by node."""

import time
from pathlib import Path
from typing import Any

from aquila.core import run_folder
from aquila.core.checkpoints import FOLDER, list_checkpoints
from aquila.core.errors import UserError
from aquila.core.jsonl import last_lines
from aquila.core.paths import ROOT
from aquila.launch.display import describe
from aquila.launch.stop import running_agents

STALE = 30.0
"""Seconds after which a controller that writes nothing counts as gone."""


def show_status(experiment: str, root: Path = ROOT) -> int:
    """Prints the newest version's state; 0 when it runs or has ended well, else its exit status."""
    folder = run_folder.experiment_dir(root, experiment)
    run_dir = run_folder.newest_launch(folder)
    if run_dir is None:
        others = sorted(path.parent.parent.name for path in root.glob("checkpoints_out/*/*/launch"))
        known = f"; there are: {', '.join(dict.fromkeys(others))}" if others else ""
        raise UserError(f"no launch of '{experiment}' under {root / 'checkpoints_out'}{known}")
    told = run_folder.read_json(run_dir / run_folder.STATUS) or {}
    state, status = overall(told, bool(running_agents(experiment, root)))
    print(f"{experiment}/{run_dir.name}: {state}")
    for line in details(run_dir, told):
        print(f"  {line}")
    for node in told.get("nodes", []):
        print(f"  {node['host']}: {node_state(node, told)}, {node['slots']} slot(s)")
    if record := told.get("record"):
        print(f"  rank {record['rank']} on {record['node']} failed first: {record['log']}")
        print(*(f"    {line}" for line in record.get("error", "").splitlines()[-5:]), sep="\n")
    return status


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


def details(run_dir: Path, told: dict[str, Any]) -> list[str]:
    """Step and speed, the newest checkpoint, the slowest rank."""
    metrics = last_lines(run_dir / "metrics.jsonl", 1)
    metric = metrics[-1] if metrics else told.get("metric", {})
    lines = [describe(metric)] if metric else ["no step logged yet"]
    if (slowest := metric.get("slowest_rank")) is not None:
        lines.append(f"slowest rank: {slowest}")
    if checkpoints := list_checkpoints(run_dir / FOLDER):
        age = time.time() - checkpoints[-1].stat().st_mtime
        lines.append(f"last checkpoint: {checkpoints[-1].name}, {ago(age)}")
    else:
        lines.append("last checkpoint: none yet")
    lines.append(f"logs: {run_dir / 'logs'}")
    return lines


def ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
