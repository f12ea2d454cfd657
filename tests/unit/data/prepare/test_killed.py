"""Killed at each step that leaves a mark on the disk, a run goes on and ends with the same bytes."""

import json
import os

import pytest

from aquila.core.errors import UserError
from aquila.data.indexfile import read_index
from aquila.data.prepare import assemble, blocks
from aquila.data.prepare.pipeline import PrepareOptions, make_datasets
from aquila.data.verify import verify_dataset
from aquila.tokenizer import load_tokenizer

KILLED = 9
STEPS = ("sync_file", "_give_name", "write_meta", "write_index")


@pytest.fixture
def request_of(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 400)
    lines = [json.dumps({"text": f"Monday {i} " * (i % 9 + 1)}) for i in range(30)]
    lines.insert(17, "bad")
    (tmp_path / "d.jsonl").write_text("\n".join(lines))

    def request(name, keys=("text",), masked=False):
        return PrepareOptions(
            [str(tmp_path / "d.jsonl")], str(tmp_path / name), on_error="skip", keys=keys, mask_prompts=masked
        )

    return request


def run_and_die_at(request, tokenizer, step):
    """In a process of its own, that ends without a word when it comes to `step`. Gives its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    taken = 0

    def counted(function):
        def called(*arguments):
            nonlocal taken
            if taken == step:
                os._exit(KILLED)
            taken += 1
            return function(*arguments)

        return called

    try:
        for name in STEPS:
            setattr(assemble, name, counted(getattr(assemble, name)))
        assemble.DatasetWriter._flush = counted(assemble.DatasetWriter._flush)
        assemble.os.replace = counted(os.replace)
        assemble.shutil.rmtree = counted(assemble.shutil.rmtree)
        make_datasets(request, tokenizer)
    except BaseException:
        os._exit(1)
    os._exit(0)


def content(tmp_path, name):
    return {
        path.name.removeprefix(name): path.read_bytes()
        for path in tmp_path.iterdir()
        if path.name.startswith(f"{name}_") and path.is_file()
    }


@pytest.mark.parametrize("masked", [False, True])
def test_killed_at_every_step(root, tmp_path, request_of, masked):
    tokenizer = load_tokenizer(root / "checkpoints_in/aquila-tiny")
    make_datasets(request_of("whole", masked=masked), tokenizer)
    whole = content(tmp_path, "whole")
    assert len(whole) == (6 if masked else 4)
    step = resumed = 0
    while True:
        request = request_of(f"s{step}", masked=masked)
        status = run_and_die_at(request, tokenizer, step)
        if status == 0:
            break
        assert status == KILLED
        if (tmp_path / f"s{step}_text_document.idx").exists():
            read_index(tmp_path / f"s{step}_text_document")
            assert content(tmp_path, f"s{step}")["_text_document.idx"] == whole["_text_document.idx"]
        resumed += make_datasets(request, tokenizer).resumed_parts > 0
        assert content(tmp_path, f"s{step}") == whole, step
        assert not (tmp_path / f"s{step}_text_document.partial").exists()
        step += 1
    assert step > 15
    assert resumed > step // 2


def test_an_older_dataset_of_the_name_is_never_mixed_with_the_new_one(root, tmp_path, request_of):
    tokenizer = load_tokenizer(root / "checkpoints_in/aquila-tiny")
    request = request_of("d")
    new = (tmp_path / "d.jsonl").read_bytes()
    step, status = 12, KILLED
    seen = set()
    while status == KILLED:
        (tmp_path / "d.jsonl").write_text('{"text": "Tuesday"}\n' * 30)
        make_datasets(request, tokenizer)
        (tmp_path / "d.jsonl").write_bytes(new)
        status = run_and_die_at(request, tokenizer, step)
        whole = (tmp_path / "d_text_document.idx").exists()
        seen.add(whole)
        if whole:
            assert verify_dataset(tmp_path / "d_text_document") == [], step
        make_datasets(request, tokenizer)
        step += 1
    assert seen == {True, False}


def test_killed_again_and_again(root, tmp_path, request_of):
    tokenizer = load_tokenizer(root / "checkpoints_in/aquila-tiny")
    make_datasets(request_of("whole"), tokenizer)
    statuses = [run_and_die_at(request_of("again"), tokenizer, 2) for _ in range(60)]
    assert statuses[0] == KILLED
    make_datasets(request_of("again"), tokenizer)
    assert content(tmp_path, "again") == content(tmp_path, "whole")


def test_a_finished_dataset_survives_a_killed_run_that_comes_after(root, tmp_path, request_of):
    """The work folder shares files with the final names for a moment: starting anew must not empty them."""
    tokenizer = load_tokenizer(root / "checkpoints_in/aquila-tiny")
    request = request_of("d")
    last = 0
    while run_and_die_at(request, tokenizer, last) == KILLED:
        last += 1
    (tmp_path / "d_text_document.idx").unlink()
    assert (
        run_and_die_at(request, tokenizer, last - 1) == KILLED
    )  # everything has its name; the folder remains
    before = content(tmp_path, "d")
    (tmp_path / "d.jsonl").write_text("bad")
    with pytest.raises(UserError):
        make_datasets(PrepareOptions([str(tmp_path / "d.jsonl")], str(tmp_path / "d")), tokenizer)
    assert content(tmp_path, "d") == before
