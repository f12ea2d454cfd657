"""The example of continued pretraining, from raw text to a report of which every number is recomputed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.integration.launch_helpers import copy_project, environment


@pytest.mark.slow
def test_from_raw_text_to_a_report_that_holds(tmp_path: Path, root: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    project = copy_project(tmp_path)
    for name in ("examples", "docs"):
        shutil.copytree(root / name, project / name)
    for page in root.glob("*.md"):
        shutil.copy(page, project)
    shutil.copytree(root / "checkpoints_in" / "aquila-tiny", project / "checkpoints_in" / "aquila-tiny")
    done = subprocess.run(
        ["bash", "examples/continued_pretraining.sh"],
        cwd=project, env={**environment(project), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=1200, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert "0 check(s) failed" in done.stdout
    assert "pass  continued, loss of step 1" in done.stdout
