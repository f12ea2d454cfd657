"""Tensors in files: safetensors and torch's zip, read one tensor at a time and without running their code.

A reader offers `info` (name to shape and dtype) and `read(name, into)`.

Own readers and writers, for what the `safetensors` library does not offer: reading into a place that exists,
in another dtype or on another device, a few MB at a time and without a map; writing from a function, one
tensor after the other. Tests and `examples/check_continued.py` use the library on the same files.
"""

import ctypes
import itertools
import json
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aquila.core.errors import UserError
from aquila.core.files import replacing, sync_file, temporary_name
from aquila.core.text_files import parse_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_LIMIT = 100 << 20
# Values that change dtype or device pass through memory in parts of this size.
_STAGE_BYTES = 4 << 20


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy()).cast("B")


class SafetensorsReader:
    """A `.safetensors` file (format: 8 bytes header length, JSON header, data). Read, not mapped.

    Raises `UserError` for a file that is damaged or cut short.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                if length > min(size, _HEADER_LIMIT):
                    raise ValueError("header length beyond the file")
                header = parse_json(file.read(length), object_pairs_hook=_without_twins)
                if not isinstance(header, dict):
                    raise ValueError("its header is no JSON object")
                if not isinstance(header.pop("__metadata__", {}), dict):
                    raise ValueError("its __metadata__ is no JSON object")
        except (OSError, ValueError, struct.error) as error:
            raise UserError(f"{path}: not a safetensors file ({error}); copy or download it again") from None
        self.info: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        data = 8 + length
        for name, entry in header.items():
            try:
                dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
                first, end = (int(n) for n in entry["data_offsets"])
            except (KeyError, TypeError, ValueError, OverflowError):
                raise UserError(f"{path}: the header's entry of {name} is damaged; copy it again") from None
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                raise UserError(f"{path}: {name} has dtype {dtype}, which is not supported here")
            info = TensorInfo(shape, _DTYPES[dtype])
            if first < 0 or min(shape, default=1) < 0 or end - first != _byte_size(info):
                raise UserError(f"{path}: {name} takes bytes {first} to {end}, its shape {_byte_size(info)}")
            if data + end > size:
                raise UserError(f"{path}: cut short: {name} ends beyond {size} bytes; copy it again")
            self.info[name], self._offsets[name] = info, data + first
        self._check_apart()

    def _check_apart(self) -> None:
        """Refuses tensors that share bytes: one of them holds what another should."""
        places = sorted((self._offsets[name], _byte_size(info), name) for name, info in self.info.items())
        for (first, size, name), (following, _, other) in itertools.pairwise(places):
            if first + size > following:
                raise UserError(f"{self.path}: {name} and {other} share bytes of the file; copy it again")

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """The tensor, in `into` when given: contiguous, of the same shape, whatever its dtype and device."""
        info = self.info[name]
        result = torch.empty(info.shape, dtype=info.dtype) if into is None else into
        flat = result.view(-1)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offsets[name])
            if result.device.type == "cpu" and result.dtype == info.dtype:
                self._fill(file, as_bytes(flat), name)
                return result
            stage = torch.empty(min(_STAGE_BYTES // info.dtype.itemsize, flat.numel()), dtype=info.dtype)
            for part in flat.split(max(1, len(stage))):
                self._fill(file, as_bytes(stage[: len(part)]), name)
                part.copy_(stage[: len(part)])
        return result

    def _fill(self, file: BinaryIO, view: memoryview, name: str) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise UserError(f"{self.path}: cut short while reading {name}; copy it again")
            done += count


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for a name that stands in it twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twins = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{twins[0]!r} stands twice in its header")
    return found


class TorchReader:
    """A file of `torch.save` (`.bin`, `.pt`): memory-mapped, tensors only, no code of the file is run.

    A state dict, or one wrapped in `{"module": ...}`. Raises `UserError` for anything else.
    """

    def __init__(self, path: Path):
        self.path = path
        content, self.mapped = _load(path)
        self.tensors = _state_dict(path, content)
        self.info = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self.tensors.items()}

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """The tensor, in `into` when given, copied out of the mapping, whose pages are then handed back."""
        tensor = self.tensors[name]
        result = torch.empty(tensor.shape, dtype=tensor.dtype) if into is None else into
        if not (tensor.is_contiguous() and result.is_contiguous()):
            return result.copy_(tensor)
        step = _STAGE_BYTES // tensor.element_size()
        for source, target in zip(tensor.view(-1).split(step), result.view(-1).split(step), strict=True):
            target.copy_(source)
            if self.mapped:
                _hand_back(source)
        return result


def _load(path: Path) -> tuple[object, bool]:
    """The file's content, and whether its tensors are mapped rather than in memory."""
    problem = "it may be damaged or hold more than tensors; copy or download it again"
    for mapped in (True, False):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), mapped
        except Exception as error:  # its reader raises whatever a damaged file leads it to
            # A file of before torch 1.6 cannot be mapped: it has to be in memory whole.
            if not (mapped and "mmap can only be used" in str(error)):
                raise UserError(f"{path}: cannot be read ({_first_line(error)}); {problem}") from None
    raise AssertionError("the loop returns or raises")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _state_dict(path: Path, content) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("module"), dict):
        content = content["module"]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path}: holds no state dict (parameter names with their tensors)")
    return content


def _hand_back(tensor: Tensor) -> None:
    """Tells the kernel that a mapped tensor's pages are done with, so that they leave this process.

    The pages are unchanged copies of the file's: were they needed again, they would be read again.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_DONTNEED))


def _byte_size(info: TensorInfo) -> int:
    count = 1
    for length in info.shape:
        count *= length
    return count * info.dtype.itemsize


def write_safetensors(
    path: Path, infos: dict[str, TensorInfo], produce: Callable[[str], Tensor], metadata: dict | None = None
) -> None:
    """Writes `path` one tensor at a time; `produce(name)` gives each as `infos` describes it.

    The file appears under its name only when it is whole and on the disk.
    """
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, info in infos.items():
        size = _byte_size(info)
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, info in infos.items():
            file.write(as_bytes(_produced(name, info, produce)))


def write_torch(path: Path, infos: dict[str, TensorInfo], produce: Callable[[str], Tensor]) -> None:
    """Writes a state dict as `torch.save` would, one tensor at a time; otherwise as `write_safetensors`.

    torch lays the file out with empty data, tells where each tensor's data lie, and they are filled in.
    """
    temporary = temporary_name(path)
    try:
        with FakeTensorMode():
            state = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, temporary)
        with FakeTensorMode():
            laid_out = torch.load(temporary, weights_only=True)
        with open(temporary, "r+b") as file:
            for name, info in infos.items():
                file.seek(laid_out[name].untyped_storage()._checkpoint_offset)
                file.write(as_bytes(_produced(name, info, produce)))
            sync_file(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _produced(name: str, info: TensorInfo, produce: Callable[[str], Tensor]) -> Tensor:
    tensor = produce(name).detach().to("cpu").contiguous()
    assert (tuple(tensor.shape), tensor.dtype) == (tuple(info.shape), info.dtype), name
    return tensor
