"""Protects: the PyTorchJob manifest: its structure, and that its command trains as the operator starts it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch_helpers as helpers
import pytest
import yaml

from aquila.launch.nodes import free_port

MANIFEST = helpers.ROOT / "docker" / "pytorchjob.yaml"


def load() -> dict:
    return yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))


def test_structure() -> None:
    """What the operator's schema asks for (kubeflow.org/v1), for the fields that are used."""
    job = load()
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert isinstance(job["spec"]["nprocPerNode"], str)  # a number is refused
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        assert all(isinstance(item["value"], str) for item in container["env"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        shutdown = next(i["value"] for i in container["env"] if i["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
        assert int(shutdown) < pod["terminationGracePeriodSeconds"]


def misfits(value: Any, kind: str, place: str) -> list[str]:
    """Where a value differs from the operator's own schema (its Python client's, and Kubernetes's)."""
    client, training = (
        pytest.importorskip(name) for name in ("kubernetes.client", "kubeflow.training.models")
    )
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{place}: not a list"]
        return [m for i, item in enumerate(value) for m in misfits(item, inner[1], f"{place}[{i}]")]
    if inner := re.fullmatch(r"dict\((?:str), (.*)\)", kind):
        return [m for key, item in value.items() for m in misfits(item, inner[1], f"{place}.{key}")]
    plain = {"str": str, "int": int, "bool": bool, "object": object}
    if kind in plain:
        # A quantity (object or str in the client) may be a number as well.
        fits = isinstance(value, plain[kind]) or (".limits." in place and isinstance(value, int))
        return [] if fits else [f"{place}: {value!r} is no {kind}"]
    model = getattr(training, kind, None) or getattr(client, kind)
    names = {key: attribute for attribute, key in model.attribute_map.items()}
    found = [f"{place}: unknown key {key}" for key in value if key not in names]
    for key in value.keys() & names.keys():
        found += misfits(value[key], model.openapi_types[names[key]], f"{place}.{key}")
    return found


def test_every_field_is_the_operator_s_schema_s() -> None:
    job = load()
    assert misfits(job, "KubeflowOrgV1PyTorchJob", "job") == []
    job["spec"]["nprocPerNode"] = 8
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["comand"] = ["x"]
    assert len(misfits(job, "KubeflowOrgV1PyTorchJob", "job")) == 3  # Master and Worker are one pod


def test_the_manifest_s_command_trains_on_two_pods(tmp_path: Path) -> None:
    project = helpers.copy_project(tmp_path)
    helpers.add_tiny_model_and_data(project)
    container = load()["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    python, *command = container["command"]
    assert python == "python"
    version = [word for word in container["args"] if word.startswith("--version")]
    words = [sys.executable, *command, "tiny.yaml", "tiny", "exp", *version]
    port = free_port("127.0.0.1")
    pods = []
    for rank in (0, 1):
        operator = {
            "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(rank), "RANK": str(rank),
            "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        environment = {**os.environ, **helpers.environment(project), **operator, "OMP_NUM_THREADS": "1"}
        log = (tmp_path / f"pod-{rank}.log").open("wb")
        pods.append(subprocess.Popen(words, cwd=project, env=environment, stdout=log, stderr=log))
    statuses = [pod.wait(180) for pod in pods]
    assert statuses == [0, 0], (tmp_path / "pod-0.log").read_text()[-2000:]
    assert helpers.steps(project / "checkpoints_out" / "exp" / "k8s") == [1, 2, 3, 4]
