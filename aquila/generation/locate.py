"""Finds the model to talk to. Without torch, so that a wrong path is answered at once."""

import sys
from collections.abc import Iterable
from pathlib import Path

from aquila.core.checkpoints import FOLDER, list_checkpoints, newest_checkpoint
from aquila.core.errors import UserError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")
HOW_TO_GET_ONE = (
    "to get one: `bash scripts/quickstart.sh` trains aquila-tiny in a few minutes, or put released weights "
    "into checkpoints_in/NAME/ and give --model-dir checkpoints_in/NAME"
)


def resolve_checkpoint(given: str | None, root: Path) -> Path:
    """The model folder to load: `given`, or the newest checkpoint of the newest run under `root`.

    `given` may be a model folder, an experiment's or a run's folder, its `checkpoints` folder, or a name
    under `root`'s `checkpoints_in`. Raises `UserError` saying how to get a model when there is none.
    """
    if given is None:
        found = _newest_of((root / "checkpoints_out").glob(f"*/*/{FOLDER}"))
        if found is None:
            raise UserError(f"no trained model under {root / 'checkpoints_out'}; {HOW_TO_GET_ONE}")
        return found
    folder = Path(given)
    if not folder.is_dir():
        named = root / "checkpoints_in" / given
        if not named.is_dir():
            raise UserError(f"model folder {folder} does not exist; {HOW_TO_GET_ONE}")
        folder = named
    if not (folder / "config.json").is_file():
        found = _newest_of([folder / FOLDER, folder]) or _newest_of(folder.glob(f"*/{FOLDER}"))
        if found is not None:
            return found
    if not has_weights(folder):
        raise UserError(
            f"{folder} holds no weights (model.safetensors or pytorch_model.bin); {HOW_TO_GET_ONE}"
        )
    return folder


def _newest_of(folders: Iterable[Path]) -> Path | None:
    """The newest undamaged checkpoint of the run that saved last, with a warning for each damaged one."""
    runs = [(found[-1], folder) for folder in folders if (found := list_checkpoints(folder))]
    for _, folder in sorted(runs, key=lambda run: (run[0].stat().st_mtime, run[0].name), reverse=True):
        found, problems = newest_checkpoint(folder)
        for problem in problems:
            print(f"warning: {problem}", file=sys.stderr)
        if found:
            return found
    return None


def has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)
