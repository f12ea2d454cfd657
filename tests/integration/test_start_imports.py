"""Protects: how soon a command answers and a rank steps, by what neither may import; a time would be luck."""

import json
import subprocess
import sys
from pathlib import Path

import launch_helpers as helpers
import pytest

COMMAND = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    print("@", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
RANK = """
import json, sys
from aquila import pretrain
from aquila.training.deepspeed.engine import Engine
step, loaded = Engine.train_step, []
def stepped(*arguments, **options):
    result = step(*arguments, **options)
    loaded[:] = sys.modules
    return result
Engine.train_step = stepped
status = pretrain.main()
print("@" + json.dumps(loaded))
sys.exit(status)
"""
TRIGGER = ("aquila.launch", "local", "hostfile", "tiny.yaml", "tiny", "exp")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = helpers.copy_project(tmp_path_factory.mktemp("starting"))
    helpers.add_tiny_model_and_data(project)
    (project / "hostfile").write_text("localhost slots=1\n")
    return project


def run(project: Path, code: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=project, env=helpers.environment(project), text=True, capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, (*TRIGGER, "--dry-run")),
        (0, ("aquila.launch", "local", "--help")),
        (2, ("aquila.launch", "status", "nothing-of-this-name")),
        (0, ("aquila.preflight", "--help")),
        (0, ("aquila.plan", "tiny", "--devices", "8", "--memory", "64GiB")),
        (0, ("aquila",)),
    ],
)
def test_a_command_that_starts_nothing_answers_without_torch(
    project: Path, status: int, words: tuple[str, ...]
) -> None:
    done = run(project, COMMAND, *words)
    assert done.returncode == status, done.stderr
    loaded = set(next(line for line in done.stderr.splitlines() if line.startswith("@")).split())
    assert "aquila" in loaded
    assert not loaded & {"torch", "deepspeed", "transformers", "matplotlib", "megatron"}


def test_a_rank_steps_without_torch_s_compiler(project: Path) -> None:
    """torch's compiler, DeepSpeed's trials of its compilers, and what draws: more than half of a start."""
    done = run(project, RANK, "tiny.yaml", "tiny", "first", "train_iters=1")
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("@"))
    loaded = set(json.loads(line[1:]))
    late = {"torch._dynamo", "torch._inductor.compile_fx", "sympy", "pandas", "matplotlib", "transformers"}
    assert not loaded & (late | {"deepspeed.ops.op_builder.all_ops"})
    assert "torch" in loaded
