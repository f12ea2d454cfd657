"""The kernels of a simulated NPU: each operator that would be launched runs on the host over the same bytes.

torch_npu's own Python, shape functions, autograd, allocator, streams and pinned memory stay as they are. What
it registers as kernels of the device is replaced, operator by operator, by the CPU's; the `npu` operators by
those of `kernels`. Collectives over "hccl" go through gloo. What was launched is in `LAUNCHED`, and at the
end of a process in a file of the folder AQUILA_SIMULATED_RECORD.
"""

import atexit
import ctypes
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from . import kernels

# No kernel: storage, strides, pinned memory. Operators that return views are found by their schema.
_NATIVE = {
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_unsafe_view",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Storage",
    "aten::set_.source_Tensor",
    "aten::set_",
    "aten::resize_",
    "aten::is_same_size",
    "aten::_has_compatible_shallow_copy_type",
    "aten::lift_fresh",
    "aten::lift",
    "aten::record_stream",
    "aten::_has_same_storage_numel",
}
_libraries: list[torch.library.Library] = []


@dataclass
class Launches:
    """Of one operator: how often, bytes of device tensors read and written, dtypes met, and distinct calls.

    `calls`, of torch_npu's own operators alone: as `written` has them.
    """

    count: int = 0
    bytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    calls: set[str] = field(default_factory=set)


LAUNCHED: dict[str, Launches] = {}
_recording = threading.Lock()


def written(operator: Any, args: tuple, kwargs: dict[str, Any]) -> str:
    """A call as JSON, by the operator's own names and without its defaults; tensors by shape and dtype."""

    def known(value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            return {"shape": list(value.shape), "stride": list(value.stride()), "dtype": dtype}
        return value if isinstance(value, int | float | str | None) else str(value)

    schema = operator._schema.arguments
    given = {**{x.name: value for x, value in zip(schema, args, strict=False)}, **kwargs}
    defaults = {x.name: x.default_value for x in schema if x.has_default_value()}
    said = {
        name: value
        for name, value in given.items()
        if isinstance(value, Tensor) or name not in defaults or value != defaults[name]
    }
    return json.dumps(tree_map(known, said))


def record(name: str, tensors: list[Tensor], call: str | None = None) -> None:
    """Counts one launch of `name` over these tensors of the device."""
    dtypes = ",".join(str(t.dtype).removeprefix("torch.") for t in tensors)
    with _recording:
        launches = LAUNCHED.setdefault(name, Launches())
        launches.count += 1
        launches.bytes += sum(t.numel() * t.element_size() for t in tensors)
        launches.dtypes.add(dtypes)
        if call is not None:
            launches.calls.add(call)


def host(tensor: Tensor) -> Tensor:
    """The CPU tensor over the bytes of a tensor of the device."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size() * tensor.element_size()
    if not size or not tensor.numel():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * size).from_address(storage.data_ptr())
    memory.owner = storage  # a collective under way outlives its tensor
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def to_device(result: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor in device memory, of the same strides where they leave no gap."""
    dense = result.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense_or_false(result)
    strides = result.stride() if dense else torch.empty(result.size(), device="meta").stride()
    out = torch.empty_strided(result.size(), strides, dtype=result.dtype, device=device)
    host(out).copy_(result)
    return out


def on_host(operator: Any) -> Callable:
    """The operator as a kernel of the device."""
    name = operator._schema.name
    if operator._schema.overload_name:
        name += "." + operator._schema.overload_name
    compute = kernels.LAUNCHED.get(name, operator)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        originals: dict[int, Tensor] = {}
        kept: list[Tensor] = []

        def down(value: Any) -> Any:
            if isinstance(value, Tensor) and value.device.type == "npu":
                alias = host(value)
                originals[id(alias)] = value
                kept.append(alias)
                return alias
            return value

        call = written(operator, args, kwargs) if name.startswith("npu::") else None
        args, kwargs = tree_map(down, (args, kwargs))
        wanted = kwargs.get("device")
        target = torch.device(wanted if wanted is not None else "npu")
        if wanted is not None:
            kwargs["device"] = "cpu"
        if name == "aten::_to_copy":
            kwargs.pop("non_blocking", None)
            kwargs.pop("pin_memory", None)
            if target.type == "npu" and kwargs.get("dtype") == torch.float64:
                kwargs["dtype"] = torch.float32  # as torch_npu does, for the device has no fp64
        if name.startswith("c10d::"):
            _give_cpu_backend(args)
        result = compute(*args, **kwargs)
        inputs = list(originals.values())

        def up(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.device.type != "cpu":
                return value
            if id(value) in originals:
                return originals[id(value)]
            if target.type != "npu" or name.startswith("c10d::"):
                return value
            made = to_device(value, _indexed(target))
            inputs.append(made)
            return made

        result = tree_map(up, result)
        record(f"{name} to the host" if target.type != "npu" else name, inputs, call)
        return result

    return kernel


def _indexed(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("npu", torch.npu.current_device())


def _give_cpu_backend(args: tuple) -> None:
    """The group's gloo, known for the device alone, is to answer for CPU tensors, too."""
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(value)
            except RuntimeError:
                continue
            devices = {device.type for device in group._device_types}
            if "cpu" not in devices:
                backend = group._get_backend(torch.device("npu"))
                group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)


def _gloo(options: Any, group_options: Any) -> Any:
    return dist.ProcessGroupGloo(
        options.store, options.group_rank, options.group_size, timeout=options.timeout
    )


def install() -> None:
    """Replaces the kernels of torch_npu, once in a process. torch calls it at the end of its own import."""
    if _libraries:
        return
    import torch_npu  # noqa: F401

    for namespace in ("aten", "npu", "c10d"):
        library = torch.library.Library(namespace, "IMPL", "PrivateUse1")
        _libraries.append(library)
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
            if (
                name.startswith(namespace + "::")
                and (operator := _operator(name))
                and _launches(operator, name)
            ):
                library.impl(name.split("::")[1], on_host(operator), allow_override=True)
    plugin = dist.Backend._plugins["HCCL"]
    dist.Backend._plugins["HCCL"] = plugin._replace(creator_fn=_gloo, extended_api=True)
    if folder := os.environ.get("AQUILA_SIMULATED_RECORD"):
        atexit.register(write_record, Path(folder))


def _operator(name: str) -> Any:
    """The Python overload of a registered operator, None for one that Python does not know."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
    except (AttributeError, RuntimeError):
        return None


def _launches(operator: Any, name: str) -> bool:
    """Whether the device would compute: not for views, storage and what is said about a tensor."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
    if name.startswith("npu::"):
        return name in kernels.LAUNCHED
    return not view and name not in _NATIVE


def write_record(folder: Path) -> None:
    """What this process launched, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with _recording:
        record = {
            name: {"count": x.count, "bytes": x.bytes, "dtypes": sorted(x.dtypes), "calls": sorted(x.calls)}
            for name, x in sorted(LAUNCHED.items(), key=lambda item: -item[1].count)
        }
    rank = os.environ.get("RANK", "0")
    (folder / f"rank{rank}-{os.getpid()}.json").write_text(json.dumps(record, indent=1))
