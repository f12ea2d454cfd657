"""Nothing in a checkpoint folder runs code: a call is planted in every file, and every reader is asked."""

import json
import subprocess
import sys
from pathlib import Path

from tests.integration.launch_helpers import environment
from tests.integration.training_runs import make_project, train

WORKER = Path(__file__).parent / "faults" / "hostile_checkpoint.py"


def test_no_file_of_a_checkpoint_runs_code(tmp_path: Path) -> None:
    """Resuming on the same set-up and on another set-up, and loading as a model folder."""
    project = make_project(tmp_path)
    status, output = train(project, "source", "train_iters=2", ranks=1)
    assert status == 0, output
    checkpoint = project / "checkpoints_out" / "source" / "0" / "checkpoints" / "step-00000002"
    (tmp_path / "marks").mkdir()
    done = subprocess.run(
        [sys.executable, WORKER, checkpoint, tmp_path / "scratch", tmp_path / "marks" / "ran"],
        cwd=project, env={**environment(project), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert list((tmp_path / "marks").iterdir()) == []
    assert answers.pop() == ["", "resume", "used"]  # without a call the very same is taken
    assert [answer for answer in answers if answer[2].startswith("traceback")] == []
    asked = {name for name, _, _ in answers}
    assert {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} < asked
    read = [answer for answer in answers if answer[0].endswith(".pt") and answer[1] != "load"]
    assert len(read) == 5, read  # model and optimizer state, each on both; random state
    for name, _, text in read:
        # DeepSpeed's facts of the model are not opened under ZeRO-2.
        unread = name.endswith("mp_rank_00_model_states.pt")
        assert text == "used" if unread else "Files of a checkpoint hold data alone" in text
