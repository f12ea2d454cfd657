"""What the hosts' answers to the preflight mean."""

import pytest

from aquila.core.errors import UserError
from aquila.launch.cluster import Cluster, NodeHandle
from aquila.preflight.hosts import Hosts
from aquila.preflight.local import PreflightReport


@pytest.mark.parametrize("asked", [False, "rowwise"])
def test_a_host_that_cannot_run_float8_is_named_when_the_run_wants_it(asked) -> None:
    members = [NodeHandle(0, "node1", 1, False), NodeHandle(1, "node2", 1, False)]
    for member in members:
        member.alive = True
    hosts = Hosts(Cluster(members, print, 60.0), PreflightReport())
    hosts._fp8 = asked
    devices = {"count": 1, "device": "gpu", "name": "test", "fp8": "native"}
    answers = (devices, devices | {"fp8": "torchao is not installed; install it"})
    hosts.answers = {number: {"devices": answer} for number, answer in enumerate(answers)}
    if not asked:
        assert hosts._devices() == "2 slots, each with a device"
        return
    with pytest.raises(UserError) as error:
        hosts._devices()
    assert str(error.value) == "node2: fp8: rowwise: torchao is not installed; install it"
