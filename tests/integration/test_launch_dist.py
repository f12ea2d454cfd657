"""Protects: runs over several real hosts (network namespaces with their own sshd), and every way they break.

After each, no process is left on any host.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import launch_helpers as helpers
import namespaces
import pytest

REASON = namespaces.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
PATIENCE = 120
"""Seconds: far beyond every time limit of the launcher's own, however slow the machine."""
LONG = {"steps": 600, "seconds": 0.1}


class Cluster:
    """Hosts with a project on a disk they share, and a terminal on the first of them."""

    def __init__(self, folder: Path, net: namespaces.Network) -> None:
        self.net = net
        self.project = helpers.copy_project(folder)
        self.environment = net.environment(helpers.environment(self.project))

    def request(self, *, hosts: list[str] | None = None, slots: int = 1, **changes) -> dict:
        addresses = hosts or [host.address for host in self.net.hosts]
        first = self.net.hosts[0]
        here = (first.address, first.address_v6, first.known_as, "localhost", "127.0.0.1")
        nodes = [{"host": address, "slots": slots, "here": address in here} for address in addresses]
        return helpers.standin_request(nodes=nodes, **changes)

    def start(self, request: dict) -> subprocess.Popen:
        return subprocess.Popen(
            self.net.hosts[0].exec(sys.executable, "-c", helpers._LAUNCH, json.dumps(request)),
            cwd=self.project, env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def launch(self, request: dict, timeout: float = 60) -> tuple[int, str, str]:
        process = self.start(request)
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err

    def run_dir(self, experiment: str = "exp") -> Path:
        return helpers.wait_for(lambda: helpers.versions(self.project, experiment))[-1]

    def wait_for_step(self, step: int, experiment: str = "exp", timeout: float = 30) -> Path:
        run_dir = self.run_dir(experiment)
        helpers.wait_for(lambda: (helpers.steps(run_dir) or [0])[-1] >= step, timeout)
        return run_dir

    def assert_clear(self, within: float = 15) -> None:
        """No process on any host. Those that `ip netns exec` left waiting for us do not count."""
        deadline = time.monotonic() + within
        while (left := self.net.left_processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left
        helpers.assert_nothing_left(self.project, within=5)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with namespaces.Network(tmp_path / "net", 3) as net:
        yield Cluster(tmp_path, net)


def make_key_strange(net: namespaces.Network, address: str) -> None:
    """From now on ssh comes to `address` with a key that nobody there knows."""
    path = net.folder / "ssh_config"
    head = f"Host {address}\n  IdentityFile {net.folder}/stranger_key\n  IdentitiesOnly yes\nHost *\n"
    rest = path.read_text().replace(f"IdentityFile {net.folder}/user_key\n", "")
    others = f"Host !{address} *\n  IdentityFile {net.folder}/user_key\n"
    path.write_text(head + rest + others)


def test_three_nodes_train_as_one_run(cluster: Cluster) -> None:
    status, _, err = cluster.launch(cluster.request())
    assert status == 0, err
    run_dir = cluster.run_dir()
    assert helpers.steps(run_dir) == [1, 2, 3, 4, 5]
    for rank, host in enumerate(cluster.net.hosts):
        lines = (run_dir / "logs" / f"{host.address}-rank-000{rank}.log").read_text().splitlines()
        assert [line for line in lines if line.startswith("rank ")] == [
            f"rank {rank} of 3 starts after step 0"
        ]
    cluster.assert_clear()


@pytest.mark.parametrize(
    "hosts",
    [
        ("node-1", "node-2", "node-3"),
        ("fd77::1", "fd77::2"),
        ("10.77.0.1", "second"),
        ("second", "10.77.0.1"),
        ("localhost", "10.77.0.2"),
        ("127.0.0.1", "10.77.0.2"),
    ],
    ids=["names", "IPv6", "alias of ssh's", "alias first", "localhost", "loopback"],
)
def test_hosts_by_name_by_ipv6_by_alias_and_this_one_as_localhost(
    cluster: Cluster, hosts: tuple[str, ...]
) -> None:
    """`second` is known to the user's ssh configuration alone; it resolves nowhere."""
    if hosts[0].startswith("fd77") and not Path("/proc/sys/net/ipv6").exists():
        pytest.skip("the kernel has no IPv6")
    path = cluster.net.folder / "ssh_config"
    path.write_text(f"Host second\n  HostName 10.77.0.2\nHost *\n{path.read_text()}")
    status, _, err = cluster.launch(cluster.request(hosts=list(hosts), steps=2))
    assert status == 0, err
    logs = cluster.run_dir() / "logs"
    for rank, host in enumerate(hosts):
        log = (logs / f"{host.replace(':', '_')}-rank-{rank:04d}.log").read_text()
        assert f"rank {rank} of {len(hosts)} starts" in log
    cluster.assert_clear()


def test_one_machine_under_two_names_is_refused(cluster: Cluster) -> None:
    status, _, err = cluster.launch(cluster.request(hosts=["10.77.0.1", "10.77.0.2", "node-2"]))
    assert status == 2
    assert "node-2 is the same machine as 10.77.0.2" in err
    assert not (cluster.project / "checkpoints_out").exists()
    cluster.assert_clear()


def test_a_failure_on_one_node_is_shown_and_clears_every_node(cluster: Cluster) -> None:
    status, _, err = cluster.launch(cluster.request(overrides=["rank2=raise"], **LONG))
    assert status == 1
    assert "rank 2 on 10.77.0.3 failed first" in err
    assert "went up in smoke" in err
    cluster.assert_clear(within=5)


def test_a_failure_after_the_launcher_has_left_clears_every_node(cluster: Cluster) -> None:
    status, out, _ = cluster.launch(cluster.request(wait=False, overrides=["rank1=kill"], **LONG))
    assert status == 0
    assert "goes on" in out
    cluster.assert_clear(within=20)
    told = json.loads((cluster.run_dir() / "launch" / "status.json").read_text())
    assert (told["state"], told["status"], told["record"]["rank"]) == ("ended", 1, 1)


def test_words_travel_as_data(cluster: Cluster) -> None:
    words = ['a=it\'s "quoted"', "b=two  blanks ", "c=$(touch pwned) `id`; rm -rf x", "d=line\nbreak", "e=*"]
    assert cluster.launch(cluster.request(overrides=words, steps=1))[0] == 0
    log = (cluster.run_dir() / "logs" / "10.77.0.3-rank-0002.log").read_text()
    line = next(line for line in log.splitlines() if line.startswith("arguments "))
    assert json.loads(line.removeprefix("arguments "))[-len(words) :] == words
    assert not list(cluster.project.rglob("pwned"))


def test_a_project_folder_with_blanks_and_quotes_in_its_name(tmp_path: Path) -> None:
    with namespaces.Network(tmp_path / "net", 2) as net:
        cluster = Cluster(tmp_path / "it's a $(touch pwned) folder", net)
        assert cluster.launch(cluster.request(steps=1))[0] == 0
        assert not list(tmp_path.rglob("pwned"))


def test_wrong_key(cluster: Cluster) -> None:
    make_key_strange(cluster.net, "10.77.0.2")
    status, _, err = cluster.launch(cluster.request())
    assert status == 2
    assert "10.77.0.2: cannot be reached over ssh" in err
    assert "Permission denied" in err
    assert not (cluster.project / "checkpoints_out").exists()
    cluster.assert_clear()


def test_an_unknown_host_key_is_refused(cluster: Cluster) -> None:
    known = cluster.net.folder / "known_hosts"
    known.write_text("".join(line for line in known.open() if not line.startswith("10.77.0.3,")))
    before = known.read_text()
    status, _, err = cluster.launch(cluster.request())
    assert status == 2
    assert "10.77.0.3" in err
    assert "Host key verification failed" in err
    assert known.read_text() == before
    cluster.assert_clear()


def test_an_unreachable_host_fails_soon(cluster: Cluster) -> None:
    cluster.net.hosts[2].set_link(up=False)
    started = time.monotonic()
    status, _, err = cluster.launch(cluster.request())
    assert time.monotonic() - started < PATIENCE
    assert status == 2
    assert "10.77.0.3: cannot be reached over ssh" in err
    assert "10.77.0.2" not in err
    cluster.assert_clear()


@pytest.mark.parametrize("stage", ["before its greeting", "after the login"])
def test_a_host_whose_ssh_hangs(cluster: Cluster, stage: str) -> None:
    host = cluster.net.hosts[1]
    host.kill()
    host.set_link(up=True)
    if stage == "before its greeting":
        silent = "import socket,time; s=socket.create_server(('', 22)); time.sleep(600)"
        hung = subprocess.Popen(host.exec(sys.executable, "-c", silent))
    else:
        config = cluster.net.folder / "sshd_config"
        config.write_text(config.read_text() + "ForceCommand sleep 600\n")
        host.revive()
        hung = None
    started = time.monotonic()
    status, _, err = cluster.launch(cluster.request())
    assert time.monotonic() - started < PATIENCE
    assert status == 2
    assert "10.77.0.2: cannot be reached over ssh" in err
    host.kill()
    if hung:
        hung.wait()
    cluster.assert_clear()


def test_a_node_with_another_version_of_the_code(cluster: Cluster, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(cluster.project / "aquila", other)
    with (other / "errors.py").open("a") as file:
        file.write("# changed\n")
    host = cluster.net.hosts[1]
    host.kill()
    host.mounts = [(other, cluster.project / "aquila")]
    host.revive()
    status, _, err = cluster.launch(cluster.request())
    assert status == 2
    assert "10.77.0.2" in err
    assert "another version of the code" in err
    cluster.assert_clear()


def test_ctrl_c_on_the_launcher(cluster: Cluster) -> None:
    process = cluster.start(cluster.request(**LONG))
    cluster.wait_for_step(3)
    for launcher in helpers.processes_of(cluster.project):
        words = helpers.command_of(launcher)
        if "-c" in words and "aquila.launch.launcher" in " ".join(words):
            launcher.send_signal(2)
    process.communicate(timeout=30)
    assert process.returncode == 75
    cluster.assert_clear(within=5)


def test_a_second_launch_while_the_first_is_running(cluster: Cluster) -> None:
    assert cluster.launch(cluster.request(wait=False, **LONG))[0] == 0
    status, _, err = cluster.launch(cluster.request())
    assert status == 2
    assert "running on this node already" in err
    stop = subprocess.run(
        cluster.net.hosts[0].exec(
            "bash", f"{cluster.project}/scripts/dist_stop_docker.sh", str(hostfile(cluster)), "exp"
        ),
        env=cluster.environment, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert stop.returncode == 0, stop.stderr
    # Node 1 ends the run on all nodes: a slow node may find nothing left to stop.
    assert re.search(r"10\.77\.0\.3: exp (has stopped|is not running)", stop.stdout)
    cluster.assert_clear(within=5)
    assert (cluster.run_dir() / "checkpoints" / "latest").exists()


def hostfile(cluster: Cluster) -> Path:
    path = cluster.project / "hostfile"
    path.write_text("".join(f"{host.address} slots=1\n" for host in cluster.net.hosts))
    return path


def test_a_link_taken_down_in_mid_run(cluster: Cluster) -> None:
    process = cluster.start(cluster.request(node_timeout=4, **LONG))
    cluster.wait_for_step(3)
    cluster.net.hosts[2].set_link(up=False)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "10.77.0.3 is lost: no sign of life" in err
    cluster.assert_clear(within=30)


def test_a_node_killed_and_brought_back_goes_on_from_the_checkpoint(cluster: Cluster) -> None:
    request = cluster.request(node_timeout=4, max_restarts=2, rejoin_timeout=40, steps=60, seconds=0.2)
    process = cluster.start(request)
    run_dir = cluster.wait_for_step(5)
    cluster.net.hosts[1].kill()
    time.sleep(8)
    cluster.net.hosts[1].revive()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, (out, err)
    assert "10.77.0.2 is back" in out
    assert helpers.steps(run_dir)[-1] == 60
    log = (run_dir / "logs" / "10.77.0.2-rank-0001.log").read_text()
    assert "starts after step 2" in log  # the stand-in's checkpoint
    cluster.assert_clear()


def test_a_node_that_stays_away_is_left_out(cluster: Cluster) -> None:
    request = cluster.request(
        node_timeout=4, max_restarts=2, rejoin_timeout=5, min_nodes=2, steps=40, seconds=0.2
    )
    process = cluster.start(request)
    run_dir = cluster.wait_for_step(5)
    cluster.net.hosts[1].kill()
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, (out, err)
    assert "going on with 2 of 3 nodes" in out
    assert "rank 1 of 2" in (run_dir / "logs" / "10.77.0.3-rank-0001.log").read_text()
    cluster.assert_clear()


@pytest.mark.slow
def test_too_few_nodes_left_says_so(cluster: Cluster) -> None:
    request = cluster.request(node_timeout=4, max_restarts=2, rejoin_timeout=4, **LONG)
    process = cluster.start(request)
    cluster.wait_for_step(3)
    cluster.net.hosts[1].kill()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "2 node(s) are left, 3 are needed" in err
    cluster.assert_clear()


def test_a_full_disk(cluster: Cluster) -> None:
    target = cluster.project / "checkpoints_out"
    target.mkdir()
    namespaces.run("mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=100", "tmpfs", str(target))
    try:
        filler = target / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
        status, _, err = cluster.launch(cluster.request(**LONG))
        assert status == 1
        assert "No space left on device" in err
        cluster.assert_clear()
    finally:
        namespaces.run("umount", "-l", str(target))


def test_sixteen_hosts_of_which_one_is_dead(tmp_path: Path) -> None:
    with namespaces.Network(tmp_path / "net", 16) as net:
        cluster = Cluster(tmp_path, net)
        net.hosts[11].kill()
        started = time.monotonic()
        status, _, err = cluster.launch(cluster.request())
        assert time.monotonic() - started < PATIENCE
        assert status == 2
        failed = [line for line in err.splitlines() if "cannot be reached" in line]
        assert len(failed) == 1
        assert "10.77.0.12" in failed[0]
        cluster.assert_clear()


def test_the_same_losses_on_one_node_and_on_several(cluster: Cluster) -> None:
    """The real training program: 2 ranks on one node and on two, 3 ranks on one node and on three."""
    helpers.add_tiny_model_and_data(cluster.project)
    one_thread = {"OMP_NUM_THREADS": "1"}  # else a node with one rank sums in another order
    cluster.environment.update(one_thread)
    losses = {}
    for name, hosts, slots in (("1x2", 1, 2), ("2x1", 2, 1), ("1x3", 1, 3), ("3x1", 3, 1)):
        request = cluster.request(
            hosts=[host.address for host in cluster.net.hosts[:hosts]],
            slots=slots,
            experiment=name,
            environment=one_thread,
        )
        request["command"] = [sys.executable, "-m", "aquila.pretrain"]
        request["arguments"] = ["tiny.yaml", "tiny", name]
        status, _, err = cluster.launch(request, timeout=120)
        assert status == 0, err
        lines = (cluster.run_dir(name) / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        assert len(losses[name]) == 4
    assert losses["1x2"] == losses["2x1"]
    assert losses["1x3"] == losses["3x1"]
    cluster.assert_clear()


def test_the_demonstration_shows_a_lost_node_and_its_return(root: Path) -> None:
    done = subprocess.run(
        ["bash", "scripts/demo_two_nodes.sh"],
        cwd=root, env={**os.environ, "AQUILA_PYTHON": sys.executable}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^== ", done.stdout, flags=re.MULTILINE)
    assert "10.77.0.2: lost (" in parts[2], done.stdout
    assert "running, restart" in parts[3], done.stdout
    assert "saving a checkpoint, then stopping" in parts[4]
    assert parts[5] == "the end: nothing is left on either node\n"


def test_nothing_is_left_of_the_namespaces() -> None:
    assert f"aq{os.getpid() % 100000}x" not in namespaces.run("ip", "netns")
