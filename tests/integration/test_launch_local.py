"""Protects: a launch on one node with real processes around stand-in ranks: status, errors, no leftovers."""

import json
import subprocess
import time
from pathlib import Path

import launch_helpers as helpers
import pytest

WITH_STOP = {"steps": 500, "seconds": 0.1}


@pytest.fixture
def project(tmp_path: Path):
    project = helpers.copy_project(tmp_path)
    yield project
    for process in helpers.processes_of(project):  # a failing test must not leave any either
        process.kill()


def test_wait_returns_0_at_the_end_and_keeps_a_log_per_rank(project: Path) -> None:
    status, out, _ = helpers.launch(project, helpers.standin_request())
    assert status == 0
    (run_dir,) = helpers.versions(project)
    assert helpers.steps(run_dir) == [1, 2, 3, 4, 5]
    assert "loss" in out
    assert out.index("step 5") < out.index("done: 5 steps") < out.index("  continue  ")
    for rank in (0, 1):
        log = (run_dir / "logs" / f"localhost-rank-000{rank}.log").read_text()
        assert f"rank {rank} of 2" in log
        assert f"rank {1 - rank} of 2" not in log
    helpers.assert_nothing_left(project)


@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        ("raise", 1, "RuntimeError: the loss of this rank went up in smoke"),
        ("user", 2, "the data of this rank is wrong"),
        ("kill", 1, "SIGKILL"),
    ],
)
def test_the_failing_rank_is_shown_and_the_others_are_gone(
    project: Path, what: str, status: int, says: str
) -> None:
    request = helpers.standin_request(overrides=[f"rank1={what}"], **WITH_STOP)
    got, _, err = helpers.launch(project, request)
    assert got == status
    assert "rank 1 on localhost failed first" in err
    assert says in err
    assert err.index(says) < err.index("| try:") < err.index("| 3. ") < err.index("| the whole log:")
    helpers.assert_nothing_left(project)


def test_a_failure_before_the_first_step_is_shown_without_wait(project: Path) -> None:
    request = helpers.standin_request(wait=False)
    request["command"] = [request["command"][0], "-c", "raise SystemExit('error: no such model')"]
    status, _, err = helpers.launch(project, request)
    assert status == 1
    assert "error: no such model" in err
    helpers.assert_nothing_left(project)


def test_without_wait_it_returns_after_the_first_step_and_training_goes_on(project: Path) -> None:
    status, out, _ = helpers.launch(project, helpers.standin_request(wait=False, steps=15, seconds=0.2))
    assert status == 0
    assert "goes on" in out
    (run_dir,) = helpers.versions(project)
    seen = helpers.steps(run_dir)
    assert 1 <= len(seen) < 10
    helpers.wait_for(lambda: helpers.steps(run_dir)[-1] == 15)
    helpers.assert_nothing_left(project)


def test_ctrl_c_saves_and_stops_and_the_same_command_continues(project: Path) -> None:
    process = helpers.start_launch(project, helpers.standin_request(**WITH_STOP))
    run_dir = helpers.wait_for(lambda: helpers.versions(project))[0]
    helpers.wait_for(lambda: len(helpers.steps(run_dir)) > 3)
    helpers.interrupt(process)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "checkpoint saved" in out
    helpers.assert_nothing_left(project)
    reached = helpers.steps(run_dir)[-1]

    status, out, _ = helpers.launch(project, helpers.standin_request(steps=reached + 3))
    assert status == 0
    assert "continues" in out
    assert helpers.versions(project) == [run_dir]
    assert helpers.steps(run_dir) == list(range(1, reached + 4))


def test_a_rank_that_has_saved_waits_for_one_that_is_saving(project: Path) -> None:
    """torchrun would take status 75 of the first for a failure and end the other while it writes."""
    process = helpers.start_launch(project, helpers.standin_request(overrides=["rank1=slow"], **WITH_STOP))
    run_dir = helpers.wait_for(lambda: helpers.versions(project))[0]
    helpers.wait_for(lambda: len(helpers.steps(run_dir)) > 3)
    helpers.interrupt(process)
    process.communicate(timeout=30)
    assert process.returncode == 75
    records = [json.loads(path.read_text()) for path in sorted((run_dir / "launch" / "ranks").iterdir())]
    assert [record["status"] for record in records] == [75, 75]
    assert records[1]["time"] - records[0]["time"] > 3
    for rank in (0, 1):
        assert "saved" in (run_dir / "logs" / f"localhost-rank-000{rank}.log").read_text().splitlines()
    assert "Sending process" not in (run_dir / "logs" / "localhost-torchrun.log").read_text()
    helpers.assert_nothing_left(project)


def test_sigterm_saves_though_no_step_has_been_seen(project: Path) -> None:
    """As when a scheduler takes the node back: the first steps may be done and not yet be known here."""
    process = helpers.start_launch(project, helpers.standin_request(steps=9, seconds=2))
    run_dir = helpers.wait_for(lambda: helpers.versions(project))[0]
    log = run_dir / "logs" / "localhost-rank-0001.log"
    helpers.wait_for(lambda: log.exists() and "starts after" in log.read_text())
    process.send_signal(15)
    process.communicate(timeout=30)
    assert process.returncode == 75
    helpers.assert_nothing_left(project)


def test_a_second_ctrl_c_kills_ranks_that_do_not_answer(project: Path) -> None:
    request = helpers.standin_request(overrides=["rank1=hang"], **WITH_STOP)
    process = helpers.start_launch(project, request)
    run_dir = helpers.wait_for(lambda: helpers.versions(project))[0]
    helpers.wait_for(lambda: len(helpers.steps(run_dir)) > 4)
    helpers.interrupt(process)
    time.sleep(1)
    helpers.interrupt(process)
    process.communicate(timeout=30)
    assert process.returncode == 1
    helpers.assert_nothing_left(project)


def test_a_killed_controller_takes_everything_with_it(project: Path) -> None:
    process = helpers.start_launch(project, helpers.standin_request(**WITH_STOP))
    run_dir = helpers.wait_for(lambda: helpers.versions(project))[0]
    helpers.wait_for(lambda: len(helpers.steps(run_dir)) > 2)
    for found in helpers.processes_of(project):
        if "aquila.launch.controller" in helpers.command_of(found):
            found.kill()
    process.communicate(timeout=30)
    assert process.returncode == 1
    helpers.assert_nothing_left(project)


def test_a_second_launch_of_a_running_experiment_is_refused(project: Path) -> None:
    request = helpers.standin_request(wait=False, **WITH_STOP)
    assert helpers.launch(project, request)[0] == 0
    status, _, err = helpers.launch(project, request)
    assert status == 2
    assert "is running on this node already" in err
    assert len(helpers.versions(project)) == 1
    # another experiment may run beside it
    assert helpers.launch(project, helpers.standin_request("other"))[0] == 0
    stop(project, "exp")


def test_stop_saves_a_checkpoint_and_leaves_nothing(project: Path) -> None:
    assert helpers.launch(project, helpers.standin_request(wait=False, **WITH_STOP))[0] == 0
    (run_dir,) = helpers.versions(project)
    helpers.wait_for(lambda: len(helpers.steps(run_dir)) > 3)
    done = stop(project, "exp")
    assert "has stopped" in done
    helpers.assert_nothing_left(project, within=5)
    latest = (run_dir / "checkpoints" / "latest").read_text()
    assert int(latest.removeprefix("step-")) == helpers.steps(run_dir)[-1]
    assert "not running" in stop(project, "exp")


def test_overrides_reach_the_rank_as_they_were_typed(project: Path) -> None:
    words = ['a=it\'s "quoted"', "b=two  blanks ", "c=$(touch pwned) `id`; rm -rf x", "d=line\nbreak", "e=*"]
    status, _, _ = helpers.launch(project, helpers.standin_request(overrides=words, steps=1))
    assert status == 0
    log = (helpers.versions(project)[0] / "logs" / "localhost-rank-0000.log").read_text()
    line = next(line for line in log.splitlines() if line.startswith("arguments "))
    assert json.loads(line.removeprefix("arguments "))[-len(words) :] == words
    assert not (project / "pwned").exists()


def test_status_of_a_running_a_stopped_a_failed_and_an_unknown_experiment(project: Path) -> None:
    assert helpers.launch(project, helpers.standin_request(wait=False, **WITH_STOP))[0] == 0
    (run_dir,) = helpers.versions(project)
    helpers.wait_for(lambda: len(helpers.steps(run_dir)) > 3)
    code, out, _ = script(project, "status.sh", "exp")
    assert code == 0
    assert "running" in out
    assert "localhost: running, 2 slot(s)" in out
    assert "100 tokens/s" in out
    assert "last checkpoint: step-00000002" in out
    code, out, _ = script(project, "status.sh", "exp", "--json")
    found = json.loads(out)
    assert (code, found["state"], found["exit_status"]) == (0, "running", 0)
    assert found["nodes"] == [{"host": "localhost", "slots": 2, "state": "running"}]
    assert found["metric"]["step"] > 3
    watch = subprocess.Popen(
        ["bash", str(project / "scripts" / "status.sh"), "exp", "--watch"],
        env=helpers.environment(project), text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    stop(project, "exp")
    watched, _ = watch.communicate(timeout=30)
    assert (watch.returncode, "stopped, checkpoint saved" in watched) == (0, True)
    code, out, _ = script(project, "status.sh", "exp")
    assert (code, "stopped, checkpoint saved" in out) == (0, True)
    helpers.launch(project, helpers.standin_request("bad", overrides=["rank1=raise"], **WITH_STOP))
    code, out, _ = script(project, "status.sh", "bad")
    assert code == 1
    assert "rank 1 on localhost failed first" in out
    code, _, err = script(project, "status.sh", "unheard-of")
    assert code == 2
    assert "there are: bad, exp" in err


def script(project: Path, name: str, *words: str) -> tuple[int, str, str]:
    """Runs one of the project's scripts from another folder."""
    done = subprocess.run(
        ["bash", str(project / "scripts" / name), *words],
        cwd=project.parent, env=helpers.environment(project), text=True, capture_output=True, timeout=30,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def stop(project: Path, experiment: str) -> str:
    code, out, err = script(project, "local_stop_docker.sh", experiment)
    assert code == 0, err
    return out
