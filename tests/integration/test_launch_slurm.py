"""Protects: the Slurm script, under a Slurm of its own on this machine (Debian's slurm-wlm and munge)."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import launch_helpers as helpers
import namespaces
import pytest

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")


def missing() -> str | None:
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    absent = [name for name in NEEDED if not shutil.which(name)]
    return f"not installed: {', '.join(absent)} (slurm-wlm, munge)" if absent else None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


class Slurm:
    """Controller, node daemons and their authentication, all under one folder.

    On this machine with one node, `n1`; on `hosts` of their own with a node each, named as they are.
    """

    def __init__(self, folder: Path, hosts: Sequence[namespaces.Host] = ()) -> None:
        self.folder, self.hosts = folder, hosts
        self.cgroups = folder / "cgroup"
        ports = [self._port(), self._port()]
        (folder / "state").mkdir(parents=True)
        (folder / "spool").mkdir()
        self.cgroups.mkdir()
        self.config = folder / "slurm.conf"
        self.config.write_text(
            f"ClusterName=t\nSlurmctldHost={socket.gethostname()}({self.address})\nSlurmUser=root\n"
            f"SlurmctldPort={ports[0]}\nSlurmdPort={ports[1]}\nAuthType=auth/munge\n"
            f"AuthInfo=socket={folder}/munge.socket\nProctrackType=proctrack/linuxproc\n"
            f"TaskPlugin=task/none\nSelectType=select/cons_tres\nStateSaveLocation={folder}/state\n"
            f"SlurmdSpoolDir={folder}/spool/%n\nSlurmctldPidFile={folder}/ctld.pid\n"
            f"SlurmdPidFile={folder}/slurmd-%n.pid\nMpiDefault=none\nReturnToService=2\n"
            + "".join(
                f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr={address} CPUs=2\n"
                for name, address in self.nodes.items()
            )
            + "PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
        )
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        self.daemons: list[subprocess.Popen] = []

    @property
    def nodes(self) -> dict[str, str]:
        """Name and address of each."""
        return {host.known_as: host.address for host in self.hosts} or {"n1": "127.0.0.1"}

    @property
    def address(self) -> str:
        """The controller's."""
        return next(iter(self.nodes.values()))

    def on(self, index: int, *words: str) -> tuple[str, ...]:
        """The command that runs `words` where node `index` is."""
        if not self.hosts:
            return words
        # `ip netns exec` mounts a new /sys, without the cgroups that slurmd asks for.
        again = 'mount --rbind "$0" /sys/fs/cgroup && exec "$@"'
        return (*self.hosts[index].exec("sh", "-c", again, str(self.cgroups)), *words)

    @staticmethod
    def _port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def __enter__(self) -> "Slurm":
        if self.hosts:
            namespaces.run("mount", "--rbind", "/sys/fs/cgroup", str(self.cgroups))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.start(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            f"--key-file={key}", f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log",
            f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        helpers.wait_for(lambda: (self.folder / "munge.socket").exists())
        self.start(*self.on(0, "slurmctld", "-D"))
        for index, name in enumerate(self.nodes):
            (self.folder / "spool" / name).mkdir()
            self.start(*self.on(index, "slurmd", "-D", "-N", name))
        ready = f"{len(self.nodes)} idle"
        helpers.wait_for(lambda: ready in self.run("sinfo", "-h", "-o", "%D %T"))
        return self

    def start(self, *words: str) -> None:
        log = (self.folder / f"daemon-{len(self.daemons)}.out").open("ab")
        self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--user=root")
            helpers.wait_for(lambda: not self.run("squeue", "-h").strip(), timeout=40)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        if self.hosts:
            namespaces.run("umount", "-l", str(self.cgroups), check=False)

    def run(self, *words: str, **changes) -> str:
        done = subprocess.run(
            self.on(0, *words), env=self.environment, text=True, capture_output=True, timeout=60, **changes
        )
        return done.stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    # Long paths do not fit into a socket's name.
    folder = Path(f"/tmp/aqslurm{os.getpid()}")
    try:
        with Slurm(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    project = helpers.copy_project(tmp_path)
    helpers.add_tiny_model_and_data(project)
    return project


def submit(slurm: Slurm, project: Path, *words: str, nodes: int = 1) -> tuple[str, Path]:
    log = project / "job.log"
    slurm.environment.update(helpers.environment(project), SLURM_CONF=str(slurm.config), AQUILA_SLOTS="2")
    script = str(project / "scripts" / "slurm.sbatch")
    job = slurm.run(
        "sbatch",
        "--parsable",
        f"--nodes={nodes}",
        f"--output={log}",
        script,
        "tiny.yaml",
        "tiny",
        *words,
        cwd=project,
    )
    return job.strip(), log


def state(slurm: Slurm, job: str) -> str:
    return slurm.run("squeue", "-h", "-j", job, "-o", "%T").strip()


def test_a_job_trains_to_its_end(slurm: Slurm, project: Path) -> None:
    """The node's name is none of this machine's: its agent is started by srun, as on every cluster."""
    job, log = submit(slurm, project, "exp")
    helpers.wait_for(lambda: log.exists() and "done: " in log.read_text(), timeout=120)
    helpers.wait_for(lambda: state(slurm, job) in ("", "COMPLETED"))
    (run_dir,) = helpers.versions(project)
    assert helpers.steps(run_dir) == [1, 2, 3, 4]
    helpers.assert_nothing_left(project)


@pytest.mark.skipif(namespaces.missing() is not None, reason=str(namespaces.missing()))
def test_a_job_on_two_nodes(project: Path, tmp_path: Path) -> None:
    """Two hosts with addresses and a node daemon of their own: a rank on each, no ssh."""
    folder = Path(f"/tmp/aqslurm{os.getpid()}b")
    try:
        with namespaces.Network(tmp_path / "net", 2) as net, Slurm(folder, net.hosts) as slurm:
            job, log = submit(slurm, project, "exp", nodes=2)
            helpers.wait_for(lambda: log.exists() and "done: " in log.read_text(), timeout=120)
            helpers.wait_for(lambda: state(slurm, job) in ("", "COMPLETED"))
            (run_dir,) = helpers.versions(project)
            assert helpers.steps(run_dir) == [1, 2, 3, 4]
            logs = sorted(path.name for path in (run_dir / "logs").glob("*-rank-*.log"))
            assert logs == [f"node-{1 + rank // 2}-rank-000{rank}.log" for rank in range(4)]
            helpers.assert_nothing_left(project)
    finally:
        if not os.path.ismount(folder / "cgroup"):  # else the machine's own cgroups would go
            shutil.rmtree(folder, ignore_errors=True)


def test_before_its_end_a_job_saves_and_goes_back_into_the_queue(slurm: Slurm, project: Path) -> None:
    job, log = submit(slurm, project, "exp", "train_iters=100000")
    run_dir = helpers.wait_for(lambda: helpers.versions(project), timeout=120)[0]
    helpers.wait_for(lambda: len(helpers.steps(run_dir)) > 2, timeout=120)
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    helpers.wait_for(lambda: "back into the queue" in log.read_text(), timeout=60)
    helpers.wait_for(lambda: state(slurm, job) == "PENDING", timeout=60)
    assert (run_dir / "checkpoints" / "latest").exists()
    slurm.run("scancel", job)
    helpers.assert_nothing_left(project)


def test_a_mistake_ends_the_job_with_its_message(slurm: Slurm, project: Path) -> None:
    job, log = submit(slurm, project, "exp", "batch_sise=2")
    helpers.wait_for(lambda: log.exists() and "did you mean 'batch_size'" in log.read_text(), timeout=60)
    helpers.wait_for(lambda: state(slurm, job) in ("", "FAILED"))
    time.sleep(0.1)
    helpers.assert_nothing_left(project)
