"""The recipe on a simulated NPU (tests/npu_simulator/): its runs are, loss by loss, those of the CPU."""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aquila.backend import npu, npu_limits
from aquila.config import ModelConfig
from aquila.planning.memory import TrainingSetup, layer_activations
from tests.integration.launch_helpers import (
    ROOT,
    add_tiny_model_and_data,
    copy_project,
    environment,
    interrupt,
    processes_of,
    wait_for,
)
from tests.integration.training_runs import exact, make_project, metrics
from tests.npu_simulator import ai_core, cann, recorded

RUNS = Path(cann.__file__).with_name("runs.py")
SHORT = ("train_iters=3", "eval_interval=2", "save_interval=100", "gradient_accumulation_steps=1")
PACKED = "document_mask=True"
SELECTIVE = "recompute=selective"
TRIANGLE = "attention=triangle"
FP32 = "precision=fp32"
ONE_RANK = {
    "one-zero2": (FP32, "zero_stage=2", TRIANGLE, SELECTIVE, "gradient_accumulation_steps=2"),
    "one-fp16": ("precision=fp16", PACKED, "attention=fused", "bmt_loss_scale=128"),
}
TWO_RANKS = {
    "two-zero1": (FP32, "zero_stage=1", TRIANGLE, PACKED),
    "two-zero3": (FP32, "zero_stage=3", PACKED, "attention=fused", SELECTIVE),
    "two-bf16": (
        "precision=bf16",
        "zero_stage=2",
        "attention=fused",
        "gradient_accumulation_steps=2",
        "deterministic=True",
    ),
}
MORE_ON_ONE_RANK = {
    "one-zero1": (FP32, "zero_stage=1", "attention=fused"),
    "one-zero3": (FP32, "zero_stage=3", PACKED, TRIANGLE),
    "one-bf16": ("precision=bf16", PACKED, SELECTIVE, "attention=fused"),
    "one-triangle16": ("precision=fp16", TRIANGLE, "bmt_loss_scale=128"),
}
MORE_ON_TWO_RANKS = {
    "two-zero2": (FP32, "zero_stage=2", "overlap_comm=True", "gradient_accumulation_steps=2"),
    "two-shared": (FP32, "zero_stage=2", PACKED, "attention=fused", "sequence_parallel=2"),
    "two-shared3": (FP32, "zero_stage=3", TRIANGLE, SELECTIVE, "sequence_parallel=2"),
    "two-export16": ("precision=bf16", "zero_stage=3", TRIANGLE, "export=hf"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    if lack := cann.missing():
        pytest.skip(lack)
    return make_project(tmp_path_factory.mktemp("simulated"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a machine with two NPUs."""
    return cann.build(tmp_path_factory.mktemp("npu"), npus=2)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The folder in which the test's processes say what they launched."""
    return tmp_path / "record"


@pytest.fixture
def simulated(machine: dict[str, str], record: Path) -> dict[str, str]:
    return {**machine, "AQUILA_SIMULATED_RECORD": str(record)}


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("localhost", 0))
        return [str(one.getsockname()[1]) for one in taken]


def start(project: Path, commands: list[list[str]], ranks: int, variables: dict[str, str]) -> list[Any]:
    """Ranks that run the commands one after the other."""
    ports = free_ports(len(commands))
    started = []
    for rank in range(ranks):
        output = tempfile.NamedTemporaryFile(mode="w+", suffix=".log")  # noqa: SIM115
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "localhost"}
        path = f"{project}:{variables.get('PYTHONPATH', '')}"
        variables_of_rank = {**{key: str(value) for key, value in own.items()}, "PYTHONPATH": path}
        process = subprocess.Popen(
            [sys.executable, str(RUNS), json.dumps(commands), *ports],
            cwd=project, stdout=output, stderr=subprocess.STDOUT,
            env={**environment(project), "OMP_NUM_THREADS": "1", **variables, **variables_of_rank},
        )  # fmt: skip
        process.printed = output
        started.append(process)
    return started


def finish(processes: list[Any]) -> str:
    """What the first rank printed, once all have ended without a fault."""
    for process in processes:
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            for one in processes:
                one.kill()
            raise
    texts = []
    for process in processes:
        process.printed.seek(0)
        texts.append(process.printed.read())
        assert process.returncode == 0, texts[-1][-5000:]
    return texts[0]


def pretrain(experiment: str, options: Sequence[str]) -> list[str]:
    return ["pretrain", "run.yaml", "small", experiment, *SHORT, *options]


def on_both(
    project: Path, simulated: dict[str, str], runs: dict[str, Sequence[str]], ranks: int, *more: list[str]
) -> tuple[str, str]:
    """The runs on CPU ranks (cpu-..., fp16 as fp32) and on simulated NPUs (npu-...), side by side.

    `more` commands follow, with {device} for npu or cpu. Returns what each side's first rank printed.
    """
    sides = {}
    for device, variables in (("npu", simulated), ("cpu", {})):
        commands = []
        for name, options in runs.items():
            kept = [FP32 if device == "cpu" and "fp16" in option else option for option in options]
            commands.append(pretrain(f"{device}-{name}", kept))
        commands += [[word.replace("{device}", device) for word in command] for command in more]
        sides[device] = start(project, commands, ranks, variables)
    cpu = finish(sides["cpu"])
    npu = finish(sides["npu"])
    assert "Ascend910B3" in npu
    return npu, cpu


def assert_same_losses(project: Path, name: str) -> None:
    """To 1e-6 in fp32; in half precision to what its rounding leaves."""
    npu, cpu = metrics(project, f"npu-{name}"), metrics(project, f"cpu-{name}")
    assert [record["step"] for record in npu] == [1, 2, 3] == [record["step"] for record in cpu]
    tolerance = 1e-6 if "16" not in name else 2e-3
    for key in ("loss", "valid_loss"):
        ours = [record[key] for record in npu if key in record]
        assert ours == pytest.approx([record[key] for record in cpu if key in record], rel=tolerance), name
        assert ours


def assert_within_limits(record: Path, *operators: str) -> None:
    """Every call that was made keeps what the vendor documents; these operators were among them.

    And nothing was launched on the device's scalar cores.
    """
    elsewhere = {
        f"{name}({dtypes})"
        for name, launches in recorded.operators(record)
        for dtypes in launches["dtypes"]
        if ai_core.on_the_ai_cpu(name, dtypes)
    }
    assert elsewhere == set()
    seen = set()
    for name, arguments in recorded.calls(record):
        if name in npu_limits.CHECKS:
            npu_limits.check(name, **arguments)
            seen.add(name)
    assert seen >= {"npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_cross_entropy_loss", *operators}


def test_one_rank_trains_stops_resumes_and_generates(
    project: Path, simulated: dict[str, str], record: Path
) -> None:
    stopped = pretrain("{device}-stopped", (*ONE_RANK["one-zero2"], "exit_interval=2"))
    run = "checkpoints_out/{device}-one-zero2/0"
    generate = [str(ROOT / "generate.py"), "--model-dir", run, "--prompt", "On Friday", "--json"]
    generate += ["--max-new-tokens", "6", "--temperature", "0", "--dtype", "fp32"]
    npu, cpu = on_both(project, simulated, ONE_RANK, 1, stopped, stopped, generate)
    for name in ONE_RANK:
        assert_same_losses(project, name)
    assert "resumes at step 2" in npu
    assert "safe on npu" in npu
    assert "environment: TASK_QUEUE_ENABLE=2" in npu
    assert "safe on npu" not in cpu
    assert exact(metrics(project, "npu-stopped")) == exact(metrics(project, "npu-one-zero2"))
    answers = [json.loads(text[text.index('{"') :].splitlines()[0])["text"] for text in (npu, cpu)]
    assert answers[0] == answers[1]
    assert_within_limits(record, "npu_fusion_attention", "npu_scaled_masked_softmax")


def reads(record: Path) -> int:
    """How often the host waited for a value of the device."""
    return sum(
        count
        for name, count in recorded.counts(record).items()
        if name == "aten::_local_scalar_dense" or name.endswith("to the host")
    )


@pytest.mark.parametrize("options", [(), (PACKED,)], ids=["plain", "packed"])
def test_a_step_reads_two_values_of_the_device(
    project: Path, machine: dict[str, str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Whether its gradients are finite, before they are applied; and what is logged, at its end.

    Two runs that differ by two steps of two micro steps.
    """
    found = []
    for steps in (2, 4):
        record = tmp_path / str(steps)
        keys = (f"train_iters={steps}", "eval_interval=100", "gradient_accumulation_steps=2", *options)
        command = pretrain(f"reads-{steps}-{len(options)}", keys)
        finish(start(project, [command], 1, {**machine, "AQUILA_SIMULATED_RECORD": str(record)}))
        found.append(reads(record))
    assert found[1] - found[0] == 2 * 2


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        pytest.param(2, TWO_RANKS, id="two ranks"),
        pytest.param(1, MORE_ON_ONE_RANK, id="more on one rank", marks=pytest.mark.slow),
        pytest.param(2, MORE_ON_TWO_RANKS, id="more on two ranks", marks=pytest.mark.slow),
    ],
)
def test_losses_are_the_cpus(
    project: Path, simulated: dict[str, str], record: Path, ranks: int, runs: dict
) -> None:
    npu, cpu = on_both(project, simulated, runs, ranks)
    for name in runs:
        assert_same_losses(project, name)
    assert_within_limits(record, "npu_fusion_attention")
    if runs is TWO_RANKS:
        assert npu.count("HCCL_DETERMINISTIC=true") == 1
        assert "HCCL_DETERMINISTIC" not in cpu


def test_the_launcher_trains_on_two_npus_and_restarts_a_killed_rank(tmp_path: Path, simulated) -> None:
    """Hostfile, preflight, probes, ranks, a save; SIGKILL of one rank; resume; Ctrl-C saves and stops."""
    project = copy_project(tmp_path)
    add_tiny_model_and_data(project)
    (project / "hostfile").write_text("localhost slots=2\n")
    keys = ["train_iters=100000", "save_interval=2", "max_restarts=1", "keep_checkpoints=1"]
    output = (tmp_path / "launch.log").open("w+")
    launch = subprocess.Popen(
        ["bash", "scripts/local_trigger_docker.sh", "hostfile", "configs/tiny.yaml", "tiny", "exp", "--wait",
         *keys],
        cwd=project, stdout=output, stderr=subprocess.STDOUT,
        env={**environment(project), **simulated, "PYTHONPATH": f"{project}:{simulated['PYTHONPATH']}"},
    )  # fmt: skip

    def logged(text: str, rank: int = 0) -> int:
        logs = (project / "checkpoints_out" / "exp").glob(f"*/logs/localhost-rank-000{rank}.log")
        return sum(log.read_text().count(text) for log in logs)

    try:
        wait_for(lambda: logged("saved checkpoints_out"), 120)
        ranks = [p for p in processes_of(project) if p.environ().get("LOCAL_RANK") == "1"]
        ranks[0].kill()
        wait_for(lambda: logged("resumes at step"), 120)
        resumed = logged("step ")
        wait_for(lambda: logged("step ") > resumed, 60)
        interrupt(launch)
        assert launch.wait(60) == 75
    finally:
        for process in [launch, *processes_of(project)]:
            process.kill()
    assert logged("2 x Ascend910B3") == 2


def ask(simulated: dict[str, str], code: str, **changes: str) -> str:
    """What a Python that sees the simulated NPUs prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**environment(ROOT), **simulated, "PYTHONPATH": f"{ROOT}:{simulated['PYTHONPATH']}", **changes},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_preflights_probe_refuses_a_chip_of_the_first_generation(simulated) -> None:
    code = "from aquila.launch.device_probe import mismatches, probe_devices as p; print(*mismatches(p()))"
    said = ask(simulated, code, AQUILA_SIMULATED_CHIP="Ascend910ProA")
    assert "Ascend910ProA is of the first Ascend 910 generation" in said


def test_the_vendors_fused_adamw_breaks_the_contract_and_the_default_keeps_it(simulated) -> None:
    """Why it is refused: see it happen."""
    code = """if True:
    import types, torch, torch_npu
    from aquila.acceptance.optimizer import contract_error
    from aquila.backend import npu, npu_limits
    def vendors(kind, params, lr, betas, eps, decay):
        return torch_npu.optim.NpuFusedAdamW(params, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    print(contract_error(npu, torch.device("npu:0"), "auto"))
    try:
        print(contract_error(types.SimpleNamespace(optimizer=vendors), torch.device("npu:0"), "npu"))
    except Exception as error:
        print(repr(error))
    """
    default, vendors = ask(simulated, code).splitlines()
    assert float(default) < 1e-5
    assert vendors == "KeyError('step')"


@pytest.mark.parametrize("kind", ["fused", "triangle"])
def test_a_layer_keeps_for_backward_what_the_planner_says(project: Path, kind: str) -> None:
    """Bytes of device memory, by torch_npu's own allocator."""
    command = [sys.executable, str(ROOT / "benchmarks" / "npu_launches.py"), "--attention", kind, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(ROOT))
    found = json.loads(done.stdout)
    model = ModelConfig(**found["model"])
    setup = TrainingSetup(devices=1, batch_size=1, seq_length=model.max_seq_len, attention=kind, **npu.KEPT)
    assert found["layer"]["kept"] == pytest.approx(layer_activations(model, setup), rel=0.05)
    assert found["round_trips"] == 0
