"""Weight files of every format, in and out. Strict: every missing, unexpected and misshapen name is listed.

Reads the released `pytorch_model.bin` (also wrapped in `module`, also sharded), safetensors (one file or
sharded), run checkpoints, and Hugging Face Llama or Aquila2 folders, whose names and rotary layout are
translated on the way. Tensors go one by one straight into place, in the wanted dtype and on the device.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aquila.config import ModelConfig, load_model_config
from aquila.config.strict import validate
from aquila.core.checkpoints import FOLDER, newest_checkpoint
from aquila.core.errors import UserError
from aquila.core.files import replacing
from aquila.core.text_files import read_json
from aquila.model import hf
from aquila.model.files import SafetensorsReader, TensorInfo, TorchReader, write_safetensors

MODEL_KEYS = ("attention", "recompute", "z_loss")
_DOWNLOAD = (
    "put the downloaded pytorch_model.bin or safetensors there, or train from scratch (bmt_pre_load: False)"
)


class Weights:
    """The parameters that a file or folder holds, under the released names.

    `info` maps names to shape and dtype; `read(name, into)` gives the values. Raises `UserError` when there
    are no weights or a file is damaged.
    """

    def __init__(self, path: str | Path, config: ModelConfig):
        self.path = resolve_model_dir(Path(path))
        self._readers = {}
        self._sources: dict[str, str] = {}
        for file in weight_files(self.path):
            reader = SafetensorsReader(file) if file.suffix == ".safetensors" else TorchReader(file)
            for name in reader.info:
                if name in self._readers:
                    raise UserError(f"{self.path}: {name} stands in two files; remove the stale one")
                self._readers[name] = reader
        infos = {name: reader.info[name] for name, reader in self._readers.items()}
        self.is_hf = hf.is_hf_names(infos)
        self._unpermute: dict[str, int] = {}
        self.info: dict[str, TensorInfo] = {}
        for stored, info in infos.items():
            name = hf.to_released(stored) if self.is_hf else stored
            if name is not None:
                self.info[name], self._sources[name] = info, stored
        if self.is_hf:
            self._unpermute = hf.permuted(config)
        # transformers does not look at an output matrix beside embeddings that are said to be tied.
        tied = hf.is_tied(self.path) if self.is_hf else "output.weight" not in self.info
        self.is_tied = tied and "tok_embeddings.weight" in self.info
        if self.is_tied and (self.is_hf or config.tied_embeddings):
            self.info["output.weight"] = self.info["tok_embeddings.weight"]
            self._sources["output.weight"] = self._sources["tok_embeddings.weight"]

    def found(self, config: ModelConfig) -> dict[str, TensorInfo]:
        """`info` as a model of `config` sees it: a tied output matrix is no parameter of its own there."""
        hidden = "output.weight" if self.is_tied and config.tied_embeddings else None
        return {name: info for name, info in self.info.items() if name != hidden}

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """One parameter, in Aquila's layout; into `into` when given, in whatever dtype that has."""
        stored = self._sources[name]
        heads = self._unpermute.get(hf.short(name))
        if heads is None:
            return self._readers[stored].read(stored, into)
        tensor = hf.unpermute(self._readers[stored].read(stored), heads)
        return tensor if into is None else into.copy_(tensor)


def resolve_model_dir(path: Path) -> Path:
    """`path`, or the newest checkpoint when it is a run's folder or its `checkpoints/`.

    Raises `UserError` when it holds checkpoints and all of them are damaged.
    """
    for folder in (path, path / FOLDER):
        found, problems = newest_checkpoint(folder)
        if found:
            return found
        if problems:
            raise UserError("\n".join(problems))
    return path


def weight_files(path: Path) -> list[Path]:
    """The files that hold a folder's weights. Raises `UserError` for none, or a missing shard."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist")
    for single, pattern in (
        ("model.safetensors", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model*.bin"),
    ):
        index = path / f"{single}.index.json"
        if index.is_file():
            return _indexed(index)
        if (path / single).is_file():
            return [path / single]
        found = sorted(path.glob(pattern))
        if found:
            return found
    raise UserError(f"{path} holds no weights (no pytorch_model*.bin, no *.safetensors): {_DOWNLOAD}")


def _indexed(index: Path) -> list[Path]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index}: weight_map must name a file for each parameter; download the index again")
    names = sorted(set(where.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        what = f"misses {', '.join(missing)}" if missing else "has an empty weight_map"
        raise UserError(f"{index}: {what}; copy or download the missing files")
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index}: weight_map names a file outside of its folder")
    return [index.parent / name for name in names]


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of a model folder, ours or Hugging Face's."""
    folder = resolve_model_dir(Path(path))
    file = folder / "config.json"
    if file.is_file() and hf.is_hf_config(values := read_json(file)):
        return hf.config_from_hf(values, str(file))
    return load_model_config(folder)


def check_names(expected: dict[str, tuple[int, ...]], found: dict[str, TensorInfo], where: str) -> None:
    """Raises `UserError` that lists every missing, unexpected and misshapen parameter."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} {tuple(found[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    lists = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    if any(names for _, names in lists):
        text = "".join(f"\n  {len(names)} {title}: {_some(names)}" for title, names in lists if names)
        raise UserError(f"{where}: the weights do not fit this config.json{text}")


def _some(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fills the model's parameters from a file or folder, in the dtype and on the device that they have.

    Raises `UserError` for what is missing, unexpected, misshapen or damaged; the model is then unchanged,
    unless a damaged file shows itself only while read.
    """
    weights = open_weights(model, path)
    for name, parameter in model.named_parameters():
        weights.read(name, parameter.data)


def open_weights(model: nn.Module, path: str | Path) -> Weights:
    """The weights of a file or folder, once they have been found to fit the model.

    Raises `UserError` for what is missing, unexpected or misshapen.
    """
    weights = Weights(path, model.config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_names(expected, weights.found(model.config), str(weights.path))
    return weights


@torch.no_grad()
def load_model(
    cls: type, path: str | Path, dtype: torch.dtype, device: torch.device | str, overrides: dict[str, Any]
) -> nn.Module:
    """`AquilaModel.from_pretrained`: one parameter at a time is allocated and filled, nothing twice."""
    options = {key: overrides.pop(key) for key in MODEL_KEYS if key in overrides}
    config = load_config(path)
    if overrides:
        config = validate(ModelConfig, {**config.model_dump(), **overrides}, f"{path} with overrides")
    model = cls(config, device="meta", dtype=dtype, **options)
    weights = open_weights(model, path)
    for name, shape in [(name, parameter.shape) for name, parameter in model.named_parameters()]:
        model.place(name, weights.read(name, torch.empty(shape, dtype=dtype, device=device)))
    return model


# ---- out -------------------------------------------------------------------------------------------------


def save_weights(
    source: nn.Module | dict[str, Tensor],
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> list[Path]:
    """Writes `model.safetensors` in released names (sharded with an index beyond `max_shard_bytes`).

    `dtype` None keeps each tensor's own. Every file appears whole or not at all.
    """
    tensors = dict(source.named_parameters()) if isinstance(source, nn.Module) else source
    infos = {name: TensorInfo(tuple(t.shape), dtype or t.dtype) for name, t in tensors.items()}
    return write_sharded(
        Path(folder), infos, lambda name: tensors[name].to(infos[name].dtype), max_shard_bytes
    )


def write_sharded(
    folder: Path, infos: dict[str, TensorInfo], produce: Callable[[str], Tensor], max_shard_bytes: int | None
) -> list[Path]:
    """safetensors in shards of at most `max_shard_bytes` (one tensor at least), with Hugging Face's index."""
    return write_parts(folder, list(_shards(infos, max_shard_bytes)), produce)


def write_parts(
    folder: Path,
    parts: list[dict[str, TensorInfo]],
    produce: Callable[[str], Tensor],
    *,
    only: int | None = None,
) -> list[Path]:
    """One safetensors file for each part, and the index; the files written. A single part needs no index.

    `only`: of several writers, the part that this one writes; the first part's writes the index, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = len(parts)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    paths = []
    for number, (name, part) in enumerate(zip(names, parts, strict=True)):
        if only in (None, number):
            write_safetensors(folder / name, part, produce)
            paths.append(folder / name)
    if count > 1 and not only:
        total = sum(_bytes(info) for part in parts for info in part.values())
        weight_map = {stored: name for name, part in zip(names, parts, strict=True) for stored in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        paths.append(folder / "model.safetensors.index.json")
        with replacing(paths[-1]) as file:
            file.write((json.dumps(index, indent=2) + "\n").encode())
    return paths


def divide(infos: dict[str, TensorInfo], writers: int) -> list[dict[str, TensorInfo]]:
    """In their order, about as many bytes for each writer: at most `writers` parts, none of them empty."""
    total, done = sum(map(_bytes, infos.values())), 0
    parts: dict[int, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        parts.setdefault(done * writers // total, {})[name] = info
        done += _bytes(info)
    return list(parts.values())


def _bytes(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * info.dtype.itemsize


def _shards(infos: dict[str, TensorInfo], limit: int | None) -> Iterator[dict[str, TensorInfo]]:
    shard, size = {}, 0
    for name, info in infos.items():
        if shard and limit and size + _bytes(info) > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = info
        size += _bytes(info)
    yield shard
