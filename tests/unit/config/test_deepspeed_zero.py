"""The tables of zero_optimization's keys are those of the installed DeepSpeed; what is refused is told."""

import enum
import typing
from pathlib import Path

import pytest

from aquila.config import deepspeed_zero as tables
from aquila.core.errors import UserError

CPU = {"device": "cpu"}


def fields(cls: type) -> typing.Iterator[tuple[str, object]]:
    """Key in the JSON and type of each field."""
    for name, field in cls.model_fields.items():
        inner = [part for part in typing.get_args(field.annotation) if part is not type(None)]
        optional = typing.get_origin(field.annotation) is typing.Union
        yield field.alias or name, inner[0] if optional else field.annotation


def kind(annotation: object) -> set[str]:
    """The table that a field of this type belongs into."""
    if typing.get_origin(annotation) is list:
        return tables.LISTS
    assert isinstance(annotation, type)
    if issubclass(annotation, bool):
        return tables.BOOLS
    if issubclass(annotation, str | Path):
        return set(tables.TEXTS)
    if issubclass(annotation, int):
        return tables.COUNTS
    return tables.OBJECTS


def test_every_field_of_deepspeed_is_known_with_its_type():
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
        OffloadDeviceEnum,
    )

    classes = {
        "": DeepSpeedZeroConfig,
        "offload_param.": DeepSpeedZeroOffloadParamConfig,
        "offload_optimizer.": DeepSpeedZeroOffloadOptimizerConfig,
        "leaf_module.": DeepSpeedZeroLeafModuleConfig,
    }
    known = {prefix + key: annotation for prefix, cls in classes.items() for key, annotation in fields(cls)}
    assert known.keys() | _REMOVED_ZERO_CONFIG_KEYS.keys() == tables.KEYS | tables.REFUSED.keys()
    for key in tables.KEYS:
        assert key in kind(known[key]), key
    assert issubclass(OffloadDeviceEnum, enum.Enum)
    assert {device.value for device in OffloadDeviceEnum} == tables.TEXTS["offload_param.device"]


@pytest.mark.parametrize(
    ("zero", "stage", "device", "message"),
    [
        ({"offload_param": CPU}, 2, "cpu", "by zero_stage 3 alone"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, 2, "cuda", "take device cpu"),
        ({"offload_optimizer": {"device": "nvme"}}, 3, "cuda", "needs nvme_path"),
        ({"zero_quantized_weights": True}, 3, "npu", "are CUDA; this is npu"),
        ({"elastic_checkpoint": True}, 3, "cpu", "goes with zero_stage 1 or 2"),
    ],
)
def test_keys_that_do_not_go_together(zero, stage, device, message):
    with pytest.raises(UserError, match=message):
        tables.check_zero(zero, stage, device)


@pytest.mark.parametrize(
    ("zero", "stage", "message"),
    [
        ({"stage3_max_live_parameters": 5}, 2, "stage3_max_live_parameters has no effect below zero_stage 3"),
        ({"pipeline_loading_checkpoint": True}, 3, "each rank reads just what it holds"),
    ],
)
def test_keys_without_effect_are_told(zero, stage, message):
    (note,) = tables.check_zero(zero, stage, "cpu")
    assert message in note


def test_what_works_is_let_through():
    zero = {"zero_hpz_partition_size": 2, "offload_param": CPU, "zero_quantized_weights": False}
    assert tables.check_zero(zero, 3, "cpu") == []
    assert tables.check_zero({"cpu_offload": True, "offload_optimizer": CPU}, 2, "npu") == []
    assert tables.check_zero({"zero_quantized_weights": True}, 3, None) == []
    assert tables.offload_device({"cpu_offload": True}, "optimizer") == "cpu"


def test_hierarchical_partitions_divide_the_devices():
    tables.check_groups({"zero_hpz_partition_size": 8}, 3, 64)
    tables.check_groups({"zero_hpz_partition_size": 8}, 3, 4)  # as DeepSpeed: one group of all
    with pytest.raises(UserError, match="zero_hpz_partition_size 8 does not divide 12 devices"):
        tables.check_groups({"zero_hpz_partition_size": 8}, 3, 12)


def test_each_refusal_has_its_reason():
    told = tables.refusals({"mics_shard_size": 4, "offload_optimizer": {"ratio": 0.5, **CPU}})
    assert told[0] == f"zero_optimization.mics_shard_size: {tables.REFUSED['mics_shard_size']}"
    assert told[1].startswith("zero_optimization.offload_optimizer.ratio: checkpoints would hold a part")
