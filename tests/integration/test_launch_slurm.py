"""Protects: the Slurm script, under a Slurm of its own on this machine (Debian's slurm-wlm and munge)."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import launch_helpers as helpers
import pytest

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")


def missing() -> str | None:
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    absent = [name for name in NEEDED if not shutil.which(name)]
    return f"not installed: {', '.join(absent)} (slurm-wlm, munge)" if absent else None


pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


class Slurm:
    """Controller, node daemon `n1` and their authentication, all under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ports = [self._port(), self._port()]
        (folder / "state").mkdir(parents=True)
        (folder / "spool").mkdir()
        self.config = folder / "slurm.conf"
        self.config.write_text(
            f"ClusterName=t\nSlurmctldHost={socket.gethostname()}(127.0.0.1)\nSlurmUser=root\n"
            f"SlurmctldPort={ports[0]}\nSlurmdPort={ports[1]}\nAuthType=auth/munge\n"
            f"AuthInfo=socket={folder}/munge.socket\nProctrackType=proctrack/linuxproc\n"
            f"TaskPlugin=task/none\nSelectType=select/cons_tres\nStateSaveLocation={folder}/state\n"
            f"SlurmdSpoolDir={folder}/spool\nSlurmctldPidFile={folder}/ctld.pid\n"
            f"SlurmdPidFile={folder}/slurmd.pid\nMpiDefault=none\nReturnToService=2\n"
            f"NodeName=n1 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN\n"
            "PartitionName=p Nodes=n1 Default=YES MaxTime=INFINITE State=UP\n"
        )
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        self.daemons: list[subprocess.Popen] = []

    @staticmethod
    def _port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def __enter__(self) -> "Slurm":
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.start(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            f"--key-file={key}", f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log",
            f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        helpers.wait_for(lambda: (self.folder / "munge.socket").exists())
        self.start("slurmctld", "-D")
        self.start("slurmd", "-D", "-N", "n1")
        helpers.wait_for(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T"))
        return self

    def start(self, *words: str) -> None:
        log = (self.folder / f"{words[0]}.out").open("ab")
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

    def run(self, *words: str, **changes) -> str:
        done = subprocess.run(
            words, env=self.environment, text=True, capture_output=True, timeout=60, **changes
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


def submit(slurm: Slurm, project: Path, *words: str) -> tuple[str, Path]:
    log = project / "job.log"
    slurm.environment.update(helpers.environment(project), SLURM_CONF=str(slurm.config), AQUILA_SLOTS="2")
    script = str(project / "scripts" / "slurm.sbatch")
    job = slurm.run(
        "sbatch", "--parsable", f"--output={log}", script, "tiny.yaml", "tiny", *words, cwd=project
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
