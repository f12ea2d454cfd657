"""Where this process is: its addresses, its interface, a free port. No `ifconfig`, nothing to edit."""

import contextlib
import ipaddress
import os
import socket

import psutil

from aquila.core.errors import UserError
from aquila.launch.hostfile import Node, as_address

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
FORWARDED_PREFIXES = (
    "ACL_", "ASCEND_", "ATB_", "COMBINED_ENABLE", "CPU_AFFINITY_", "CUBLAS_", "CUDA_", "DS_", "GLOO_",
    "HCCL_", "INF_NAN_", "KMP_", "LD_LIBRARY_PATH", "MKL_", "MULTI_STREAM_", "NCCL_", "NPU_", "OMP_",
    "P2P_HCCL_", "PYTORCH_", "TASK_QUEUE_", "TORCH", "TRITON_", "AQUILA_",
)  # fmt: skip
"""What training itself reads from the environment, and so follows the user to the other nodes."""


def local_interfaces() -> dict[str, str]:
    """Address to interface name, for every address of this machine (here: of this network namespace)."""
    found: dict[str, str] = {}
    for interface, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                found[str(ipaddress.ip_address(address.address.split("%")[0]))] = interface
    return found


def local_names() -> set[str]:
    """The names under which this machine knows itself."""
    name = socket.gethostname().lower()
    names = {name, name.split(".")[0]}
    with contextlib.suppress(OSError):
        names.add(socket.getfqdn().lower())
    return names - {""}


def resolve(host: str) -> list[str]:
    """The addresses of a host name, none when it does not resolve."""
    try:
        return list(dict.fromkeys(str(item[4][0]).split("%")[0] for item in socket.getaddrinfo(host, None)))
    except (OSError, UnicodeError):
        return []


def is_this_node(host: str) -> bool:
    """Whether a hostfile's `host` means this machine: by address, by name, or as `localhost`."""
    interfaces = local_interfaces()
    address = as_address(host)
    if address is not None:
        return address.is_loopback or str(address) in interfaces
    name = host.lower().rstrip(".")
    if name == "localhost" or name in local_names():
        return True
    return any(found in interfaces for found in resolve(host))


def find_this_node(nodes: list[Node], where: str) -> Node:
    """This machine's line of the hostfile.

    Raises `UserError` when no line means this machine, or more than one does.
    """
    mine = [node for node in nodes if is_this_node(node.host)]
    if not mine:
        addresses = ", ".join(a for a in local_interfaces() if not ipaddress.ip_address(a).is_link_local)
        raise UserError(
            f"{where}: none of its hosts ({', '.join(node.host for node in nodes)}) is this node, which is "
            f"{socket.gethostname()} with {addresses}; add a line '{socket.gethostname()} slots=N'"
        )
    if len(mine) > 1:
        both = " and ".join(f"{node.host} (line {node.line})" for node in mine[:2])
        raise UserError(f"{where}: {both} are both this node; remove one")
    return mine[0]


def free_port(address: str = "") -> int:
    """A TCP port that nobody listens on now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def address_towards(other: str) -> str | None:
    """This machine's address on the way to `other`, None when there is no way. Sends nothing."""
    for found in resolve(other):
        family = socket.AF_INET6 if ":" in found else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((found, 9))
            return probe.getsockname()[0]
    return None


def forwarded_environment() -> dict[str, str]:
    """The variables of this environment that a rank on another node should see as well."""
    return {key: value for key, value in os.environ.items() if key.startswith(FORWARDED_PREFIXES)}


def interface_settings(address: str, single_node: bool) -> dict[str, str]:
    """The socket interface of every communication library, for those the user has not set.

    On a single node the loopback interface serves gloo, which else needs the host name to resolve.
    """
    interfaces = local_interfaces()
    if single_node:
        loopback = interfaces.get("127.0.0.1") or interfaces.get("::1")
        wanted = {"GLOO_SOCKET_IFNAME": loopback} if loopback else {}
    else:
        interface = interfaces.get(address)
        wanted = dict.fromkeys(INTERFACE_VARIABLES, interface) if interface else {}
        if interface:  # HCCL matches a bare name as a prefix: bond0 would mean bond0.150, too
            wanted["HCCL_SOCKET_IFNAME"] = f"={interface}"
    return {key: value for key, value in wanted.items() if key not in os.environ}
