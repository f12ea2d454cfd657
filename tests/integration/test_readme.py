"""Every command of the README, typed as it stands, in a copy of the project.

A small model folder stands at `checkpoints_in/aquila-7b`, and the demo run is cut to a few steps; the
commands themselves are not touched.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launch_helpers import copy_project, environment

SMALL = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32, "vocab_size": 1217, "max_seq_len": 64}
NEVER_HERE = {
    "bash scripts/run_tests.sh": "is what runs this test",
    "bash scripts/install.sh": "has its own test",
}


def commands(path: Path) -> list[str]:
    """The lines of every bash block, in order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.strip().splitlines()]


def test_both_languages_show_the_same_commands(root: Path) -> None:
    assert commands(root / "README.md") == commands(root / "README_zh.md")
    assert len(commands(root / "README.md")) >= 10


def test_ci_calls_run_tests_and_nothing_else(root: Path) -> None:
    lines = (root / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.strip() and not line.startswith(("#", "cd ", "set "))] == [
        "exec bash scripts/run_tests.sh"
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with a small stand-in for aquila-7b and a corpus."""
    root = Path(__file__).resolve().parents[2]
    project = copy_project(tmp_path_factory.mktemp("readme"))
    for name in ("hostfile", "generate.py"):
        shutil.copy(root / name, project)
    tiny = root / "checkpoints_in" / "aquila-tiny"
    for name in ("aquila-tiny", "aquila-7b"):
        shutil.copytree(tiny, project / "checkpoints_in" / name, dirs_exist_ok=True)
    (project / "checkpoints_in" / "aquila-7b" / "config.json").write_text(json.dumps(SMALL))
    demo = project / "configs" / "Aquila-tiny.yaml"
    demo.write_text(re.sub(r"train_iters: \d+", "train_iters: 3", demo.read_text()))
    with (project / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for n in range(200):
            file.write(json.dumps({"text": f"Document {n}. 第{n}篇。" * 12}, ensure_ascii=False) + "\n")
    return project


def test_every_command_runs_as_it_stands(project: Path, root: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands(root / "README.md"):
        if command in NEVER_HERE:
            continue
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=project,
            env={**environment(project), "PATH": path, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (run,) = (path for path in (project / "checkpoints_out" / "my_experiment").iterdir() if path.is_dir())
    names = {path.name for path in run.iterdir()}
    assert {
        "effective_config.yaml",
        "metrics.jsonl",
        "logs",
        "tensorboard",
        "loss.png",
        "checkpoints",
    } <= names


def test_every_link_of_the_documents_leads_somewhere(root: Path) -> None:
    pages = [root / name for name in ("README.md", "README_zh.md", "CONTRIBUTING.md")]
    for page in [*pages, *sorted((root / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


def test_the_readme_stays_short(root: Path) -> None:
    for name in ("README.md", "README_zh.md"):
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 150, f"{name}: {len(lines)} lines; what is more belongs into docs/"
