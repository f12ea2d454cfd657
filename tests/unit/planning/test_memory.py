"""Protects: the memory estimate against autograd's own account, and ZeRO's arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aquila.backend import cpu, cuda, npu
from aquila.config import ModelConfig, load_run_config
from aquila.model import AquilaModel, loss
from aquila.planning import memory
from aquila.planning.memory import TrainingSetup, bytes_sent, estimate, layer_activations, setup_of
from aquila.training.deepspeed import zero_step

MODEL = ModelConfig(dim=128, n_layers=2, n_heads=4, multiple_of=32, vocab_size=500, max_seq_len=96)
SEVEN_B = ModelConfig(dim=4096, n_layers=32, n_heads=32, multiple_of=256, vocab_size=100008)


def saved_bytes(model: AquilaModel, batch_size: int, seq_length: int) -> int:
    """Bytes that autograd keeps for backward, parameters left out, every storage once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.zeros(batch_size, seq_length, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_activations_of_a_layer_are_what_autograd_keeps(precision: str, kv_heads: int) -> None:
    config = MODEL.model_copy(update={"n_kv_heads": kv_heads})
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    layers = {
        n: saved_bytes(AquilaModel(config.model_copy(update={"n_layers": n}), dtype=dtype), 3, 96)
        for n in (1, 2)
    }
    setup = TrainingSetup(devices=1, batch_size=3, seq_length=96, precision=precision, one_pass=True)
    assert layers[2] - layers[1] == pytest.approx(layer_activations(config, setup), rel=0.02)


@pytest.mark.parametrize("kind", ["triangle", "reference"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_that_keeps_its_scores(kind: str, precision: str, kv_heads: int) -> None:
    config = MODEL.model_copy(update={"n_kv_heads": kv_heads, "max_seq_len": 1024})
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    layers = {
        n: saved_bytes(
            AquilaModel(config.model_copy(update={"n_layers": n}), dtype=dtype, attention=kind), 2, 1024
        )
        for n in (1, 2)
    }
    setup = TrainingSetup(
        devices=1,
        batch_size=2,
        seq_length=1024,
        precision=precision,
        one_pass=True,
        attention=kind,
        lazy_buffers=True,
    )
    assert layers[2] - layers[1] == pytest.approx(layer_activations(config, setup), rel=0.05)


def test_the_triangle_keeps_its_probabilities() -> None:
    """A third of Aquila-7B's activations."""
    setup = TrainingSetup(devices=8, batch_size=1, seq_length=2048, attention="triangle")
    more = layer_activations(SEVEN_B, setup) - layer_activations(SEVEN_B, replace(setup, attention="fused"))
    assert more == pytest.approx(2 * 32 * 2048 * (2048 + 512) / 2, rel=0.02)


def test_the_loss_chunk_is_the_model_s() -> None:
    assert memory.LOGITS_BYTES.items() <= cpu.LOGITS_BYTES.items()
    assert memory.LOGITS_BYTES.items() <= npu.LOGITS_BYTES.items()
    assert set(cuda.LOGITS_BYTES.values()) == {memory.LARGEST_LOGITS_BYTES}
    assert memory.MAX_ROUNDINGS == loss.MAX_ROUNDINGS


def test_the_optimizer_step_is_the_one_that_runs() -> None:
    """DeepSpeed's own step casts a rank's gradients to fp32 at once, and copies them on one device, too."""
    assert zero_step.BLOCK["cpu"] == memory.STEP_BLOCK_CPU
    assert memory.STEP_BLOCK == zero_step.LARGE_BLOCK
    ours = TrainingSetup(devices=1, batch_size=1, seq_length=2048, bucket=1e8, checkpointed_layers=32)
    theirs = replace(ours, blockwise=False)
    more = estimate(SEVEN_B, theirs).peak - estimate(SEVEN_B, ours).peak
    assert more > 3.5 * SEVEN_B.parameter_count()
    for without in ({"zero_stage": 3}, {"offload": True}):
        assert estimate(SEVEN_B, replace(ours, **without)) == estimate(SEVEN_B, replace(theirs, **without))


@pytest.mark.parametrize("words", [["zero_step=deepspeed"], ["optimizer=apex"], []])
def test_a_run_s_set_up_says_whose_step_it_takes(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "config.json").write_text(MODEL.model_dump_json())
    (tmp_path / "run.yaml").write_text("data_prefix: corpus\n")
    config = load_run_config(str(tmp_path / "run.yaml"), str(tmp_path), words, root=tmp_path)
    assert setup_of(config, 2, "npu", npu.KEPT).blockwise is not bool(words)
    assert not setup_of(config, 2, "npu", npu.KEPT, blockwise=False).blockwise


def test_states_under_zero() -> None:
    """Sixteen bytes a parameter, divided as the ZeRO paper's figure 1 says."""
    total = SEVEN_B.parameter_count()
    assert total == 7_295_537_152
    setup = TrainingSetup(devices=64, batch_size=1, seq_length=2048)

    def states(stage: int) -> float:
        found = estimate(SEVEN_B, replace(setup, zero_stage=stage))
        return found.parameters + found.gradients + found.optimizer

    assert states(0) == 16 * total
    assert states(1) == 4 * total + 12 * total / 64
    assert states(2) == 2 * total + 14 * total / 64
    assert states(3) == 16 * total / 64 + 2 * memory.LIVE_PARAMETERS


def test_offload_moves_the_optimizer_to_the_host() -> None:
    setup = TrainingSetup(devices=8, batch_size=1, seq_length=2048)
    here, away = estimate(SEVEN_B, setup), estimate(SEVEN_B, replace(setup, offload=True))
    assert (away.optimizer, away.gradients) == (0, 0)
    assert away.host >= here.optimizer
    assert away.peak < here.peak


def test_recomputing_layers_lowers_the_peak_and_more_tokens_raise_it() -> None:
    setup = TrainingSetup(devices=8, batch_size=2, seq_length=2048)
    peaks = [estimate(SEVEN_B, replace(setup, checkpointed_layers=n)).peak for n in (0, 8, 26, 32)]
    assert peaks == sorted(peaks, reverse=True)
    assert estimate(SEVEN_B, replace(setup, batch_size=4)).peak > peaks[0]


def test_traffic() -> None:
    """ZeRO paper, section 7, but for stage 2, where DeepSpeed all-reduces in every micro step."""
    setup = TrainingSetup(devices=4, batch_size=1, seq_length=8)
    once = MODEL.parameter_count() * 2 * 3 / 4
    sent = [bytes_sent(MODEL, replace(setup, zero_stage=stage)) for stage in range(4)]
    assert sent == [2 * once, 2 * once, 3 * once, 3 * once]
    accumulated = replace(setup, zero_stage=2, gradient_accumulation_steps=8)
    assert bytes_sent(MODEL, accumulated) == 17 * once
    assert bytes_sent(MODEL, replace(setup, devices=1)) == 0


def test_building_is_a_moment_of_its_own():
    """Under ZeRO-3 a share and the largest parameter, else the whole model."""
    setup = TrainingSetup(devices=64, batch_size=1, seq_length=128, fixed=7)
    whole = SEVEN_B.parameter_count()
    largest = SEVEN_B.vocab_size * SEVEN_B.dim
    found = [estimate(SEVEN_B, replace(setup, zero_stage=stage)).phases["building"] for stage in (2, 3)]
    assert found == [2 * whole + 7, 2 * (whole / 64 + largest) + 7]


def test_devices_that_share_samples_hold_less_and_send_more():
    """Per layer and pass each sends (N-1)/N of queries, keys, values and what attention gives."""
    setup = TrainingSetup(devices=64, batch_size=1, seq_length=4096, zero_stage=3)
    alone, shared = setup, replace(setup, sequence_parallel=8)
    whole, part = (estimate(SEVEN_B, each) for each in (alone, shared))
    assert part.activations == pytest.approx(whole.activations / 8)
    assert (part.parameters, part.optimizer) == (whole.parameters, whole.optimizer)
    extra = bytes_sent(SEVEN_B, shared) - bytes_sent(SEVEN_B, alone)
    assert extra == 2 * 32 * 2 * 512 * 4 * 4096 * 7 / 8
    few = SEVEN_B.model_copy(update={"n_kv_heads": 4})  # each is sent to two
    assert bytes_sent(few, shared) - bytes_sent(few, alone) == pytest.approx(extra * 2.5 / 4)


def test_hierarchical_partitions_take_memory_and_save_traffic():
    setup = TrainingSetup(devices=64, batch_size=1, seq_length=128, zero_stage=3)
    flat, divided = (estimate(SEVEN_B, replace(setup, hpz=size)) for size in (1, 8))
    assert divided.parameters - flat.parameters == 2 * SEVEN_B.parameter_count() / 8
    sent = [bytes_sent(SEVEN_B, replace(setup, hpz=size)) for size in (1, 8)]
    assert sent[1] == pytest.approx(sent[0] * 2 / 3)


def test_the_copy_for_a_background_save_is_told():
    setup = TrainingSetup(devices=64, batch_size=1, seq_length=128)
    found = [estimate(SEVEN_B, replace(setup, zero_stage=stage)).snapshot for stage in (2, 3)]
    assert found == [12 * SEVEN_B.parameter_count() / 64, 14 * SEVEN_B.parameter_count() / 64]
