"""The machine before anything computes: what is installed, what goes together, what is free."""

from typing import Any

from aquila.acceptance.table import Measured, Table
from aquila.launch.device_probe import mismatches, probe_devices
from aquila.launch.fabric import fabric_problems, probe_fabric


def check_machine(table: Table) -> dict[str, Any]:
    """Lines for versions, free memory and the devices' network. Returns `probe_devices`'s facts."""
    facts: dict[str, Any] = {}

    def versions() -> Measured:
        facts.update(probe_devices())
        problems = mismatches(facts)
        told = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        return Measured(len(problems), 0, "problems", detail="; ".join(problems) or told)

    def memory() -> Measured:
        share = facts["memory_free"] / facts["memory"]
        return Measured(100 * share, 50, "%", at_least=True, detail=f"of {facts['memory'] / 2**30:.0f} GiB")

    def network() -> Measured:
        found = probe_fabric(facts["count"])
        errors, warnings = fabric_problems({"here": found}, 2) if found else ([], [])
        told = "; ".join(errors + warnings)
        return Measured(len(errors), 0, "problems", detail=told or ("" if found else "no hccn_tool here"))

    table.check("machine", "versions", versions)
    if facts:
        table.check("machine", "free memory of the first device", memory)
        table.check("machine", "links and TLS of the devices", network)
    return facts
