"""The command itself: the original's bytes, killed at any moment, its figures and its errors."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from data_tools.demo_corpus import document

EXTENSIONS = (".bin", ".idx", ".meta.json")


@pytest.fixture
def command(root):
    """`command(*arguments, cwd=...)` runs data_tools/make_indexed_dataset.sh."""

    def run(*arguments, **options):
        words = ["bash", str(root / "data_tools/make_indexed_dataset.sh"), *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=False, **options)

    return run


@pytest.mark.parametrize("name", ["aquila-demo.jsonl", "alpaca-data-conversation.json"])
def test_bytes_of_the_original(command, shared_dir, tmp_path, name):
    data, stem = shared_dir / "data", name.split(".")[0]
    golden = json.loads((data / "golden/indexed_datasets.json").read_text())[stem]
    for workers in (1, 2):
        done = command(
            "--input", data / "corpus" / name, "--output-prefix", f"out{workers}/{stem}",
            "--model-dir", data / "aquila-tokenizer", "--workers", workers, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"{golden['documents']:,} documents, {golden['tokens']:,} tokens" in done.stdout
        for kind in ("bin", "idx"):
            written = (tmp_path / f"out{workers}/{stem}_text_document.{kind}").read_bytes()
            assert hashlib.sha256(written).hexdigest() == golden[f"{kind}_sha256"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "demo.jsonl"
    lines = (json.dumps({"text": document(1, i)}, ensure_ascii=False) for i in range(1500))
    path.write_text("".join(f"{line}\n" for line in lines) * 8, encoding="utf-8")
    return path


def start(root, corpus, prefix, workers=2):
    words = [sys.executable, "-m", "data_tools.make_indexed_dataset", "--input", corpus]
    words += ["--output-prefix", prefix, "--model-dir", root / "checkpoints_in/aquila-tiny"]
    words += ["--workers", workers]
    return subprocess.Popen(
        list(map(str, words)), cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def content(prefix):
    return [prefix.with_name(f"{prefix.name}_text_document{e}").read_bytes() for e in EXTENSIONS]


def parts_of(prefix):
    """How many parts the journal of an unfinished run counts; its first line is the plan."""
    journal = prefix.with_name(f"{prefix.name}_text_document.partial") / "journal"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.is_file() else 0


def reaches(run, prefix, parts):
    """Waits until the journal counts so many parts; False when the run was over before that was seen."""
    while run.poll() is None:
        if parts_of(prefix) >= parts:
            return True
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_and_started_again(root, corpus, tmp_path, how):
    whole = start(root, corpus, tmp_path / "whole")
    assert whole.wait() == 0
    dice = random.Random(how)
    for attempt in range(2):
        prefix = tmp_path / f"killed{attempt}"
        for parts in (0, 1, 2):
            run = start(root, corpus, prefix, workers=1 + attempt)
            if not reaches(run, prefix, parts):
                break
            time.sleep(dice.random() / 100)
            run.send_signal(how)
            run.communicate()
            finals = list(tmp_path.glob(f"{prefix.name}_text_document.idx"))
            assert all(p.read_bytes() == content(tmp_path / "whole")[1] for p in finals)
        kept = parts_of(prefix)
        run = start(root, corpus, prefix, workers=1 + attempt)
        out, err = run.communicate()
        assert run.returncode == 0, err
        assert "went on from" in out or not kept
        assert content(prefix) == content(tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
    assert orphans(tmp_path) == []


def orphans(folder):
    """Processes that still name the folder in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read()  # noqa: SIM115
        except OSError:
            continue
        if str(folder).encode() in words and int(pid) != os.getpid():
            found.append(pid)
    return found


def test_workers_end_with_a_killed_parent(root, corpus, tmp_path):
    run = start(root, corpus, tmp_path / "killed")
    while len(orphans(tmp_path / "killed")) < 2 and run.poll() is None:  # until a worker is there
        time.sleep(0.001)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 5
    while orphans(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans(tmp_path / "killed") == []


def test_two_runs_on_one_output(root, corpus, tmp_path):
    first = start(root, corpus, tmp_path / "same")
    deadline = time.monotonic() + 20
    while not (tmp_path / "same_text_document.partial/journal").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    second = start(root, corpus, tmp_path / "same")
    _, err = second.communicate()
    assert first.wait() == 0
    assert second.returncode in (0, 2)
    if second.returncode == 2:
        assert "another process is making" in err


def test_bad_line_stops_with_its_place_and_can_be_skipped(command, root, corpus, tmp_path):
    lines = corpus.read_bytes().splitlines(keepends=True)[:5000]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"".join([*lines[:4200], b'{"text": 5}\n', *lines[4200:]]))
    arguments = ("--input", bad, "--output-prefix", tmp_path / "out")
    arguments += ("--model-dir", root / "checkpoints_in/aquila-tiny")
    stopped = command(*arguments)
    assert stopped.returncode == 2
    assert f"{bad}, line 4201: 'text' holds a number, not text" in stopped.stderr
    skipped = command(*arguments, "--on-error", "skip")
    assert skipped.returncode == 0
    assert "1 bad documents were skipped" in skipped.stdout
    assert "5,000 documents" in skipped.stdout


def test_a_very_long_line(command, root, tmp_path):
    """20 MB here; the same path takes 100 MB."""
    text = "Monday is a day. 星期一。\n" * 700_000
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + '{"text": "short"}\n')
    done = command(
        "--input",
        path,
        "--output-prefix",
        tmp_path / "out",
        "--model-dir",
        root / "checkpoints_in/aquila-tiny",
    )
    assert done.returncode == 0, done.stderr
    assert "2 documents" in done.stdout


def test_progress_in_a_terminal(root, corpus, tmp_path):
    pexpect = pytest.importorskip("pexpect")
    words = ["-m", "data_tools.make_indexed_dataset", "--input", str(corpus)]
    words += ["--output-prefix", str(tmp_path / "o"), "--model-dir", "checkpoints_in/aquila-tiny"]
    child = pexpect.spawn(sys.executable, words, cwd=str(root), timeout=60)
    child.expect(r"\[[#.]+\] +\d+%  [\d,]+ documents/s  [\d.]+ MB/s  [\d,]+ tokens  \d+:\d\d left")
    child.expect(r"12,000 documents")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "give at least 1"),
        (["--model-dir", "none"], "does not exist"),
        (["--json-keys", "a", "a"], "a key stands twice"),
        (["--input", "none.jsonl"], "does not exist"),
    ],
)
def test_wrong_arguments(command, root, corpus, tmp_path, arguments, message):
    usual = [
        "--input",
        corpus,
        "--output-prefix",
        tmp_path / "o",
        "--model-dir",
        root / "checkpoints_in/aquila-tiny",
    ]
    done = command(*usual, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
