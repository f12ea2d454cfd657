"""Resumes from, and loads, checkpoints with a call planted in one file each; prints a line of JSON for each.

    hostile_checkpoint.py CHECKPOINT SCRATCH MARK

The calls make the folder MARK-FILE; all checksums agree, as whoever plants a call writes the manifest, too.
One process does it all, by the entry points themselves, since starting one takes longer than what it does.
"""

import itertools
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from aquila import pretrain
from aquila.core.checkpoints import MANIFEST, STATE, fingerprint
from aquila.core.errors import UserError
from aquila.model import AquilaModel
from aquila.tokenizer import load_tokenizer
from aquila.training.deepspeed.processes import processes


class Call:
    """Pickles as a call of `os.mkdir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def planted(source: Path, target: Path, name: str, mark: Path, form: str) -> Path:
    """A copy of `source` whose file `name` calls when it is unpickled."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    call = {"tok_embeddings.weight": Call(mark)}
    if form == "pickle":
        (target / name).write_bytes(pickle.dumps(call))
    else:
        torch.save(call, target / name, _use_new_zipfile_serialization=form == "zip")
    files = [path for path in target.rglob("*") if path.is_file() and path.name != MANIFEST]
    if name != MANIFEST:
        entries = {str(path.relative_to(target)): fingerprint(path) for path in files}
        (target / MANIFEST).write_text(json.dumps(entries))
    return target


_runs = itertools.count()


def outcome(action: Callable[[], object]) -> str:
    try:
        action()
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "used"


def resume(checkpoint: Path, *overrides: str) -> object:
    sys.argv = ["pretrain", "run.yaml", "small", f"hostile-{next(_runs)}", f"resume={checkpoint}", *overrides]
    return pretrain.main()


def load(folder: Path) -> None:
    load_tokenizer(folder)
    AquilaModel.from_pretrained(folder)


def main() -> None:
    source, scratch, mark = map(Path, sys.argv[1:])
    group = processes("gloo", torch.device("cpu"), 1800)
    world = group.__enter__()  # for all of them: DeepSpeed does not take a second one in a process
    pretrain.processes = lambda *_: nullcontext(world)
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    for name in names:
        here = mark.with_name(f"{mark.name}-{name.replace('/', '_')}")
        trained = name.endswith(".pt") or name in (STATE, MANIFEST, "model.safetensors")
        actions = {"resume": resume} if trained else {"load": load}
        if name.startswith("deepspeed/"):
            actions["convert"] = lambda f: resume(f, "zero_stage=1")
        for what, action in actions.items():
            folder = planted(source, scratch / "step-00000002", name, here, "zip")
            print(json.dumps([name, what, outcome(lambda a=action, f=folder: a(f))]), flush=True)
    for form in ("zip", "legacy", "pickle"):
        folder = planted(source, scratch / "step-00000002", "pytorch_model.bin", mark, form)
        (folder / "model.safetensors").unlink()
        print(json.dumps(["pytorch_model.bin", "load", outcome(lambda f=folder: load(f))]), flush=True)
    print(json.dumps(["", "resume", outcome(lambda: resume(source))]), flush=True)


if __name__ == "__main__":
    main()
