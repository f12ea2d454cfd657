"""A file of `torch.save` is read as data: what it would call is not called."""

import contextlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila.core.errors import UserError
from aquila.training.deepspeed.safe_load import load, safely


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self.what = function, arguments

    def __reduce__(self):
        return self.what


def write(path: Path, content: object, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("inside", [lambda call: call, lambda call: {"a": [torch.ones(2), (call,)]}])
@pytest.mark.parametrize("function", [os.mkdir, open, eval, exec, torch.load])
def test_no_call_is_made(tmp_path, monkeypatch, form, inside, function) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {
        os.mkdir: ("ran",), open: ("ran", "w"), eval: ("open('ran', 'w')",), exec: ("open('ran', 'w')",),
        torch.load: ("other.pt",),
    }[function]  # fmt: skip
    write(tmp_path / "file.pt", inside(Call(function, *arguments)), form)
    with pytest.raises(UserError, match=r"file\.pt: not read .*source you know"):
        load(tmp_path / "file.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


def test_one_who_asks_torch_to_be_unsafe_gets_it_safely(tmp_path) -> None:
    """As DeepSpeed asks everywhere."""
    torch.save(Call(os.mkdir, str(tmp_path / "ran")), tmp_path / "file.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    with safely():
        assert torch.load(tmp_path / "good.pt", map_location="cpu", weights_only=False)["a"].sum() == 2
        with pytest.raises(UserError):
            torch.load(tmp_path / "file.pt", weights_only=False)
        with pytest.raises(UserError):
            torch.load(str(tmp_path / "file.pt"), torch.device("cpu"), pickle, weights_only=False)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_message(tmp_path_factory, data) -> None:
    """Damaged anywhere, cut anywhere: an answer or a `UserError`, nothing else."""
    path = tmp_path_factory.mktemp("fuzz") / "file.pt"
    form = data.draw(st.sampled_from(["zip", "legacy", "pickle"]))
    write(path, {"a": [1, "b", 2.0], "t": torch.arange(3)} if form != "pickle" else {"a": 1}, form)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    with contextlib.suppress(UserError):
        load(path)
