"""Everything that is changed or read in DeepSpeed beyond its public interface, in one table.

A release of DeepSpeed that the table was not checked against keeps its own optimizer step
(`why_not_blockwise`); the other entries are scoped to one call, and fail loudly when a name is gone.

Frozen: nothing. Free: everything, with a new look at the sources of each release that joins `CHECKED`.
Guarded by: tests/unit/training/deepspeed/test_patches.py.
"""

from typing import NamedTuple

CHECKED = ("0.19.8",)
"""Releases whose source the table was compared with."""


class Patch(NamedTuple):
    """One thing of DeepSpeed that is replaced, called or read though it is not public.

    where: its name in the class. source: the first 12 digits of the SHA-256 of its source in the checked
    releases, by `inspect.getsource`. why: what is done with it, and for what; "read" when
    its source is counted on, no more. guard: the test that fails
    when it no longer holds.
    """

    where: str
    source: str
    why: str
    guard: str


_STEP = "tests/integration/test_blockwise_step.py"
_TRAINING = "tests/integration/test_training.py"
_HOSTILE = "tests/integration/test_hostile_checkpoint.py"
_STATE = "tests/integration/test_state_conversion.py"
PATCHES = {
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": (
        Patch(
            "step", "9520884fd916", "replaced by zero_step.py: one pass over memory instead of five", _STEP
        ),
        Patch(
            "process_gradients", "a05fe9cac73c", "replaced: gradients stay where autograd made them", _STEP
        ),
        Patch("reduce_ready_partitions_and_remove_grads", "46ef5f92c1b8", "replaced, for the same", _STEP),
        Patch("reduce_ipg_grads", "a41525b603f1", "replaced by gradient_exchange.py on CPUs", _STEP),
        Patch(
            "_use_compact_grad_partition_buffer", "b4b53eb20083", "asked: are gradients kept whole?", _STEP
        ),
        Patch("_update_scale", "456ef78f7cba", "called: the loss scale moves as in DeepSpeed's step", _STEP),
        Patch("_release_preflattened_grad_buffers", "329a5065e5ee", "called at the end of the step", _STEP),
        Patch("_lazy_init_hp_params_optimizer_state", "45e666d78112", "called at the end of the step", _STEP),
        Patch("_link_all_hp_params", "e91c2f7e8f29", "read: what a rank holds", _STATE),
        Patch("state_dict", "2ad067a97760", "read: the form of shards (saved_state.py)", _STATE),
    ),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": (
        Patch("set_grad_positions", "b6a16f474a21", "read: what a rank holds", _STATE),
        Patch("_create_fp16_sub_groups", "f6d2d2f11751", "read: no parameter is cut", _STATE),
        Patch("_rigid_state_dict", "9a67500b2f2c", "read: the form of shards (saved_state.py)", _STATE),
        Patch("checkpoint_event_prologue", "01713a52e24b", "called when precision changes", _STATE),
        Patch("checkpoint_event_epilogue", "9b05d627407c", "called when precision changes", _STATE),
    ),
    "deepspeed.runtime.engine:DeepSpeedEngine": (
        Patch(
            "_do_optimizer_sanity_check",
            "fd92e39132a6",
            "replaced while the engine is built: ZeRO-1 in bf16 would not skip steps",
            _TRAINING,
        ),
        Patch(
            "_copy_recovery_script",
            "4bfd767dbf04",
            "silenced while a checkpoint is taken: the script is for folders without a model",
            _TRAINING,
        ),
        Patch(
            "module_state_dict",
            "821457b7b444",
            "emptied while a checkpoint is taken: weights are saved beside, as a model folder",
            _TRAINING,
        ),
        Patch(
            "load_checkpoint",
            "5728d3dfa42a",
            "called for state in files (NVMe), with a torch.load that reads data alone (safe_load.py)",
            _HOSTILE,
        ),
    ),
}
"""By module:class."""


def why_not_blockwise(release: str) -> str | None:
    """Why a release of DeepSpeed takes its own step, or None where the table was checked against it."""
    if release.partition("+")[0] in CHECKED:
        return None
    return f"DeepSpeed {release} was not checked, only {', '.join(CHECKED)}"
