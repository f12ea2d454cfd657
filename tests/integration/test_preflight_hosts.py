"""Protects: what the preflight finds on other hosts, real ones in network namespaces, all at once."""

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


class Cluster:
    def __init__(self, folder: Path, net: namespaces.Network) -> None:
        self.net = net
        self.project = helpers.copy_project(folder)
        helpers.add_tiny_model_and_data(self.project)
        self.environment = net.environment(helpers.environment(self.project))
        self.hostfile()

    def hostfile(self, slots: int = 1) -> None:
        lines = [f"{host.address} slots={slots}\n" for host in self.net.hosts]
        (self.project / "hostfile").write_text("".join(lines))

    def command(self, *words: str, timeout: float = 90) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.net.hosts[0].exec(*words),
            cwd=self.project, env=self.environment, text=True, capture_output=True, timeout=timeout,
        )  # fmt: skip

    def preflight(self, *overrides: str) -> tuple[int, dict[str, tuple[str, str]]]:
        """Exit status, and state and detail of each check."""
        done = self.command(
            sys.executable, "-m", "aquila.preflight", "hostfile", "tiny.yaml", "tiny", *overrides
        )
        assert "Traceback" not in done.stderr, done.stderr
        # A further problem of a check stands in a line of its own, indented.
        whole = re.sub(r"\n\s+", "; ", done.stdout)
        rows = re.findall(r"^(pass|warn|fail)  (\S+(?: \S+)*)  +(.*)$", whole, re.MULTILINE)
        return done.returncode, {check: (state, detail) for state, check, detail in rows}

    def give_disk_of_its_own(self, host: namespaces.Host, *targets: Path) -> None:
        """`targets` are from now on empty folders on that host."""
        for number, target in enumerate(targets):
            own = self.net.folder / f"disk-{host.index}-{number}"
            own.mkdir()
            host.mounts.append((own, target))
        host.kill()
        host.revive()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with namespaces.Network(tmp_path / "net", 3) as net:
        yield Cluster(tmp_path, net)
        assert not net.left_processes()


def test_all_in_order(cluster: Cluster) -> None:
    before = sorted(cluster.project.rglob("*"))
    status, rows = cluster.preflight()
    assert status == 0
    assert {state for state, _ in rows.values()} == {"pass"}, rows
    assert {"hosts reached", "clocks", "devices of hosts", "versions of hosts"} <= rows.keys()
    assert {"files on hosts", "disk space", "shared disk", "network"} <= rows.keys()
    after = [path for path in sorted(cluster.project.rglob("*")) if "__pycache__" not in path.parts]
    assert after == [path for path in before if "__pycache__" not in path.parts]


def test_a_host_that_swallows_everything_fails_the_trigger(cluster: Cluster) -> None:
    """No refusal, no 'no route': packets to it go nowhere, and only time tells. All checks included."""
    first = cluster.net.hosts[0].name
    nobody = ("lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
    namespaces.run("ip", "-n", first, "neigh", "replace", "10.77.0.3", *nobody)
    started = time.monotonic()
    done = cluster.command("bash", "scripts/dist_trigger_docker.sh", "hostfile", "tiny.yaml", "tiny", "exp")
    took = time.monotonic() - started
    print(f"{took:.1f} s")
    assert done.returncode == 2
    assert "10.77.0.3: cannot be reached over ssh" in done.stderr
    assert "10.77.0.2" not in done.stderr
    assert not (cluster.project / "checkpoints_out").exists()
    assert took < 120  # the time limits of ssh, not for ever


def test_all_failures_at_once(cluster: Cluster) -> None:
    cluster.hostfile(slots=99)
    cluster.net.hosts[2].kill()
    status, rows = cluster.preflight("batch_sise=3")
    assert status == 2
    assert "did you mean 'batch_size'" in rows["configuration"][1]
    assert rows["hosts reached"][0] == "fail"
    assert "10.77.0.3" in rows["hosts reached"][1]
    assert rows["devices of hosts"][0] == "fail"
    assert "10.77.0.1: slots=99" in rows["devices of hosts"][1]
    assert "10.77.0.2: slots=99" in rows["devices of hosts"][1]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler for another clock")
@pytest.mark.parametrize(("shift", "state"), [(3, "pass"), (60, "fail"), (-60, "fail")])
def test_a_clock_that_is_off(cluster: Cluster, shift: int, state: str) -> None:
    cluster.net.hosts[1].shift_clock(shift)
    status, rows = cluster.preflight()
    assert (status, rows["clocks"][0]) == (2 if state == "fail" else 0, state), rows
    if state == "fail":
        assert f"10.77.0.2: its clock is {shift:+d} s from this machine's; set it" in rows["clocks"][1]
        assert "10.77.0.3" not in rows["clocks"][1]


def test_a_disk_that_is_not_shared_is_named(cluster: Cluster) -> None:
    output = cluster.project / "checkpoints_out"
    output.mkdir()
    cluster.give_disk_of_its_own(cluster.net.hosts[1], output)
    status, rows = cluster.preflight()
    assert status == 2
    state, detail = rows["shared disk"]
    assert state == "fail"
    assert f"{output} must be one folder that all nodes share" in detail
    assert "10.77.0.2" in detail
    assert "10.77.0.3" not in detail


def test_data_missing_on_a_node(cluster: Cluster) -> None:
    cluster.give_disk_of_its_own(cluster.net.hosts[2], cluster.project / "data")
    status, rows = cluster.preflight()
    assert status == 2
    assert "10.77.0.3" in rows["files on hosts"][1]
    assert "tiny_text_document.bin is missing" in rows["files on hosts"][1]


def test_configuration_and_model_are_copied_to_a_node_without_them(cluster: Cluster) -> None:
    """Only checkpoints_out and the data are shared: the real training program runs all the same."""
    models, configs = cluster.project / "checkpoints_in", cluster.project / "configs"
    cluster.give_disk_of_its_own(cluster.net.hosts[1], models, configs)
    (cluster.project / "checkpoints_out").mkdir()
    status, rows = cluster.preflight()
    assert status == 0
    assert rows["files on hosts"][0] == "warn"
    done = cluster.command(
        "bash", "scripts/dist_trigger_docker.sh", "hostfile", "tiny.yaml", "tiny", "exp", "--wait"
    )
    assert done.returncode == 0, done.stderr
    assert "copying to 10.77.0.2" in done.stdout
    (run_dir,) = helpers.versions(cluster.project)
    assert helpers.steps(run_dir) == [1, 2, 3, 4]
    disks = cluster.net.folder
    assert (disks / "disk-2-0" / "tiny" / "config.json").exists()
    assert (disks / "disk-2-1" / "tiny.yaml").exists()


def test_ports_closed_between_two_nodes(cluster: Cluster) -> None:
    """ssh works, other ports do not: a firewall. (A route to nowhere for one pair of nodes.)"""
    host = cluster.net.hosts[1]
    namespaces.run("ip", "-n", host.name, "route", "add", "blackhole", "10.77.0.3/32")
    status, rows = cluster.preflight()
    assert status == 2
    state, detail = rows["network"]
    assert state == "fail"
    assert "10.77.0.2 cannot reach 10.77.0.3" in detail


def test_another_version_of_a_package(cluster: Cluster) -> None:
    """A host whose Python has another deepspeed: its own site folder comes first there."""
    other = cluster.net.folder / "site"
    (other / "deepspeed-0.0.1.dist-info").mkdir(parents=True)
    (other / "deepspeed-0.0.1.dist-info" / "METADATA").write_text("Name: deepspeed\nVersion: 0.0.1\n")
    host = cluster.net.hosts[2]
    place = cluster.project / "deepspeed-0.0.1.dist-info"
    place.mkdir()
    shutil.copytree(other / "deepspeed-0.0.1.dist-info", cluster.net.folder / "info", dirs_exist_ok=True)
    host.mounts.append((cluster.net.folder / "info", place))
    host.kill()
    host.revive()
    status, rows = cluster.preflight()
    assert status == 2
    assert "10.77.0.3 has deepspeed 0.0.1, 10.77.0.1 has" in rows["versions of hosts"][1]


def test_eight_hosts_at_once(tmp_path: Path) -> None:
    """The time is printed, not judged: eight hosts share this machine's cores."""
    with namespaces.Network(tmp_path / "net", 8) as net:
        cluster = Cluster(tmp_path, net)
        started = time.monotonic()
        status, rows = cluster.preflight()
        print(f"{time.monotonic() - started:.1f} s")
        assert status == 0, rows
