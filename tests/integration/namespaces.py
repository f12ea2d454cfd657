"""Real hosts for tests: network namespaces on a bridge of their own, each with its own address and sshd.

Needs root, `ip` (iproute2) and `sshd` (openssh-server). Nothing leaves the namespaces: the bridge has a
namespace of its own and no way out. They share the machine's disk and process numbers.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

SSHD = "/usr/sbin/sshd"
_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long shift(void) { const char *text = getenv("CLOCK_SHIFT"); return text ? atol(text) : 0; }
int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += shift();
    return status;
}
int gettimeofday(struct timeval *now, void *zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int status = real(now, zone);
    now->tv_sec += shift();
    return status;
}
time_t time(time_t *at) {
    struct timeval now;
    gettimeofday(&now, 0);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""
"""Linux has one clock for all namespaces: a host with another one is a library before the C library's."""


def missing() -> str | None:
    """Why there can be no hosts here, None when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "iproute2 is not installed"
    if not Path(SSHD).exists():
        return "openssh-server is not installed"
    probe = subprocess.run(["ip", "netns", "add", f"aqprobe{os.getpid()}"], capture_output=True, text=True)
    if probe.returncode:
        return f"network namespaces do not work here: {probe.stderr.strip()}"
    run("ip", "netns", "del", f"aqprobe{os.getpid()}")
    return None


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Host:
    """One namespace. `index` from 1; its addresses are 10.77.0.`index` and fd77::`index`.

    Its name is node-`index`, known to all hosts of the network, and to nobody else.
    """

    def __init__(self, net: "Network", index: int) -> None:
        self.net, self.index = net, index
        self.name = f"{net.prefix}{index}"
        self.address = f"10.77.0.{index}"
        self.address_v6 = f"fd77::{index:x}"
        self.known_as = f"node-{index}"
        self.link = f"v{net.prefix}{index}"
        self.sshd: subprocess.Popen | None = None
        self.mounts: list[tuple[Path, Path]] = []

    def create(self) -> None:
        run("ip", "netns", "add", self.name)
        bridge = self.net.bridge
        run("ip", "-n", bridge, "link", "add", self.link, "type", "veth", "peer", "eth0", "netns", self.name)
        run("ip", "-n", bridge, "link", "set", self.link, "master", "br0", "up")
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        run("ip", "-n", self.name, "link", "set", "eth0", "up")
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        v6 = (f"{self.address_v6}/64", "dev", "eth0", "nodad")
        run("ip", "-n", self.name, "-6", "addr", "add", *v6, check=False)  # where the kernel has IPv6
        etc = Path("/etc/netns") / self.name  # `ip netns exec` lays these files over /etc
        etc.mkdir(parents=True)
        names = "".join(f"{host.address} {host.known_as}\n" for host in self.net.hosts)
        (etc / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def start_sshd(self) -> None:
        # `ip netns exec` gives a mount namespace as well: a disk of its own where the test wants one.
        binds = "".join(f"mount --bind '{source}' '{target}' && " for source, target in self.mounts)
        command = f"{binds}exec {SSHD} -D -e -f '{self.net.folder}/sshd_config'"
        log = (self.net.folder / f"sshd-{self.index}.log").open("ab")
        self.sshd = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", command], stdout=log, stderr=log
        )
        deadline = time.monotonic() + 10
        while b"Server listening" not in Path(log.name).read_bytes():
            if self.sshd.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(Path(log.name).read_text())
            time.sleep(0.05)

    def pids(self) -> list[int]:
        return [int(pid) for pid in run("ip", "netns", "pids", self.name, check=False).split()]

    def processes(self) -> list[str]:
        """The command lines of what runs on this host, sshd's own aside."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                if words and state != "Z" and "sshd" not in words.split(" ")[0]:
                    found.append(words)
        return found

    def kill(self) -> None:
        """As if the node lost its power: every process of it is gone, at once."""
        self.set_link(up=False)  # no last words over the network
        for _ in range(3):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.sshd:
            self.sshd.wait(5)

    def shift_clock(self, seconds: int) -> None:
        """From now on its clock is that much ahead for what its sshd starts: a library tells the time."""
        library = self.net.folder / "clock.so"
        source = self.net.folder / "clock.c"
        source.write_text(_CLOCK)
        run("cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
        config = self.net.folder / f"sshd_config-{self.index}"
        text = (self.net.folder / "sshd_config").read_text()
        config.write_text(f"{text}SetEnv LD_PRELOAD={library} CLOCK_SHIFT={seconds}\n")
        self.mounts.append((config, self.net.folder / "sshd_config"))
        self.kill()
        self.revive()

    def revive(self) -> None:
        (self.net.folder / f"sshd-{self.index}.log").unlink(missing_ok=True)
        self.set_link(up=True)
        self.start_sshd()

    def set_link(self, up: bool) -> None:
        run("ip", "-n", self.net.bridge, "link", "set", self.link, "up" if up else "down")

    def exec(self, *words: str) -> list[str]:
        """The command that runs `words` on this host."""
        return ["ip", "netns", "exec", self.name, *words]


class Network:
    """`count` hosts. A context manager: made on entry, removed with everything in them on exit."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.prefix = f"aq{os.getpid() % 100000}x"
        self.bridge = f"{self.prefix}sw"
        self.hosts = [Host(self, index) for index in range(1, count + 1)]

    def __enter__(self) -> "Network":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_keys()
        try:
            run("ip", "netns", "add", self.bridge)
            run("ip", "-n", self.bridge, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", self.bridge, "link", "set", "br0", "up")
            for host in self.hosts:
                host.create()
                host.start_sshd()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            with contextlib.suppress(Exception):
                host.kill()
            run("ip", "netns", "del", host.name, check=False)
            shutil.rmtree(f"/etc/netns/{host.name}", ignore_errors=True)
        run("ip", "netns", "del", self.bridge, check=False)

    def _write_keys(self) -> None:
        folder = self.folder
        for name in ("host_key", "user_key", "stranger_key"):
            if not (folder / name).exists():
                run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)  # where Debian's sshd wants to be locked in
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPort 22\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPidFile none\n"
            "PasswordAuthentication no\nLogLevel INFO\nMaxStartups 100\n"
        )
        key = (folder / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(
            "".join(
                f"{host.address},{host.address_v6},{host.known_as} {' '.join(key)}\n" for host in self.hosts
            )
        )
        (folder / "ssh_config").write_text(
            f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n"
            "GlobalKnownHostsFile /dev/null\nHashKnownHosts no\n"
        )
        # ssh takes the home folder from the password file, not from $HOME: a wrapper brings our config.
        bin_dir = folder / "bin"
        bin_dir.mkdir(exist_ok=True)
        wrapper = bin_dir / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F "{folder}/ssh_config" "$@"\n')
        wrapper.chmod(0o755)

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        return {**base, "PATH": f"{self.folder}/bin:{base['PATH']}"}

    def left_processes(self) -> dict[str, list[str]]:
        return {host.address: words for host in self.hosts if (words := host.processes())}
