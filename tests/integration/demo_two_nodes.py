"""A run over two nodes, shown: launch, status, a node that loses its power, its return, and the stop.

The nodes are network namespaces of this machine, each with its own address and sshd; they and everything in
them are removed at the end, in whichever way it comes. The commands are those of a real cluster.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aquila.core import run_folder
from tests.integration import launch_helpers as helpers
from tests.integration import namespaces

EXPERIMENT = "demo"


class Demo:
    """A terminal on the first of two nodes."""

    def __init__(self, folder: Path, net: namespaces.Network) -> None:
        self.net = net
        self.project = helpers.copy_project(folder)
        helpers.add_tiny_model_and_data(self.project)
        text = "".join(f"{host.address} slots=1\n" for host in net.hosts)
        (self.project / "hostfile").write_text(text)
        self.environment = net.environment({**helpers.environment(self.project), "OMP_NUM_THREADS": "1"})
        self.environment["COLUMNS"] = "100"

    def run(self, command: str, *, status: int = 0) -> str:
        """Shows the command and what it prints. Raises `RuntimeError` for another exit status."""
        print(f"\nnode-1$ {command}", flush=True)
        done = subprocess.run(
            self.net.hosts[0].exec("bash", "-c", f"exec 2>&1; {command}"), cwd=self.project,
            env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
        print(done.stdout.rstrip(), flush=True)
        if done.returncode != status:
            raise RuntimeError(f"{command}: exit status {done.returncode}")
        return done.stdout

    def wait_for_step(self, step: int) -> None:
        (run_dir,) = helpers.wait_for(lambda: helpers.versions(self.project, EXPERIMENT))
        helpers.wait_for(lambda: max(helpers.steps(run_dir) or [0]) >= step, 120)

    def status(self) -> dict[str, Any]:
        (run_dir,) = helpers.versions(self.project, EXPERIMENT)
        return run_folder.read_json(run_dir / run_folder.STATUS) or {"nodes": []}


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main() -> int:
    if reason := namespaces.missing():
        print(f"error: {reason}; as root: apt-get install openssh-server iproute2", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, namespaces.Network(Path(folder) / "net", 2) as net:
        demo = Demo(Path(folder), net)
        show(demo)
        left = net.left_processes()
    say("the end: " + ("nothing is left on either node" if not left else f"left over: {left}"))
    return 1 if left else 0


def show(demo: Demo) -> None:
    """All of it, in order."""
    say("two nodes, 10.77.0.1 and 10.77.0.2; ssh between them, a disk that both see")
    demo.run("cat hostfile")
    demo.run("bash scripts/dist_trigger_docker.sh hostfile configs/tiny.yaml tiny demo train_iters=100000 "
             "save_interval=20 keep_checkpoints=2 log_interval=5 max_restarts=3 node_timeout=5")  # fmt: skip
    demo.wait_for_step(60)
    demo.run("bash scripts/status.sh demo")
    say("node-2 loses its power")
    demo.net.hosts[1].kill()
    helpers.wait_for(lambda: any(node["lost"] for node in demo.status()["nodes"]), 60)
    demo.run("bash scripts/status.sh demo")
    say("node-2 is back; nobody types a command")
    before = max(helpers.steps(helpers.versions(demo.project, EXPERIMENT)[0]))
    demo.net.hosts[1].revive()
    demo.wait_for_step(before + 40)
    demo.run("bash scripts/status.sh demo")
    say("the stop: every rank finishes its step, and a checkpoint is saved")
    demo.run("bash scripts/dist_stop_docker.sh hostfile demo")
    demo.run("ls checkpoints_out/demo/*/checkpoints")


if __name__ == "__main__":
    sys.exit(main())
