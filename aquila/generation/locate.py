"""Finds the model to talk to. Without torch, so that a wrong path is answered at once."""

import re
from collections.abc import Iterable
from pathlib import Path

from aquila.core.errors import UserError

_STEP = re.compile(r"step-(\d+)$")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "model.safetensors.index.json")
HOW_TO_GET_ONE = (
    "to get one: `bash scripts/quickstart.sh` trains aquila-tiny in a few minutes, or put released weights "
    "into checkpoints_in/NAME/ and give --model-dir checkpoints_in/NAME"
)


def find_model_dir(given: str | None, root: Path) -> Path:
    """The model folder to load: `given`, or the newest checkpoint of the newest run under `root`.

    `given` may be a model folder, an experiment's or a run's folder, its `checkpoints` folder, or a name
    under `root`'s `checkpoints_in`. Raises `UserError` saying how to get a model when there is none.
    """
    if given is None:
        found = newest_checkpoint(root / "checkpoints_out")
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
        found = _newest_of([folder / "checkpoints", folder]) or _newest_of(folder.glob("*/checkpoints"))
        if found is not None:
            return found
    if not has_weights(folder):
        raise UserError(
            f"{folder} holds no weights (model.safetensors or pytorch_model.bin); {HOW_TO_GET_ONE}"
        )
    return folder


def newest_checkpoint(runs: Path) -> Path | None:
    """The newest checkpoint of the newest run under `runs` (EXP/VERSION/checkpoints/step-N)."""
    return _newest_of(runs.glob("*/*/checkpoints"))


def _newest_of(folders: Iterable[Path]) -> Path | None:
    found = [latest for folder in folders if (latest := _latest(folder))]
    return max(found, key=lambda path: (path.stat().st_mtime, path.name), default=None)


def has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)


def _latest(checkpoints: Path) -> Path | None:
    """What `latest` names; when it is missing or names nothing whole, the highest step that is whole."""
    try:
        named = checkpoints / (checkpoints / "latest").read_text(encoding="utf-8").strip()
        if named.parent == checkpoints and _whole(named):
            return named
    except OSError:
        pass
    steps = [path for path in checkpoints.glob("step-*") if _STEP.fullmatch(path.name) and _whole(path)]
    return max(steps, key=lambda path: int(_STEP.fullmatch(path.name).group(1)), default=None)


def _whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and has_weights(folder)
