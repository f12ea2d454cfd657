"""The architecture file: the original's keys, derived sizes, and errors that name the key."""

import json

import pytest

from aquila.config import ModelConfig, load_model_config
from aquila.core.errors import UserError

AQUILA_7B = {
    "dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05,
    "vocab_size": 100008, "max_seq_len": 2048, "initializer_range": 0.006, "flash_atten": False,
    "flash_atten_llama_style": False, "checkpoint_activations": True, "ckpoint_layer": 26,
    "use_triangle_attn": True,
}  # fmt: skip


def test_aquila_7b_has_its_known_size() -> None:
    config = ModelConfig(**AQUILA_7B)
    assert config.ffn_dim == 11008
    assert config.parameter_count() == 7_295_537_152
    assert config.checkpointed_layers == 26
    assert config.flops_per_token(2048) == pytest.approx(42.93e9, rel=1e-3)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "ffn_dim"), [(6144, 4096, 1.3, 24576), (8192, 4096, 1.3, 28672)]
)
def test_feed_forward_size_of_the_larger_models(
    dim: int, multiple_of: int, multiplier: float, ffn_dim: int
) -> None:
    config = ModelConfig(
        dim=dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier, n_heads=64, n_kv_heads=8
    )
    assert config.ffn_dim == ffn_dim


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dimm": 4}, "unknown key 'dimm'; did you mean 'dim'?"),
        ({"n_layer": 4}, "did you mean 'n_layers'?"),
        ({"dim": "4096"}, "dim: input should be a valid integer"),
        ({"dim": 100, "n_heads": 3}, "dim 100 is not a multiple of n_heads 3"),
        ({"dim": 12, "n_heads": 4}, "must be even"),
        ({"n_heads": 8, "n_kv_heads": 3}, "not a multiple of n_kv_heads 3"),
        ({"checkpoint_activations": 1}, "checkpoint_activations"),
        ({"n_layers": 0}, "n_layers"),
    ],
)
def test_mistakes_are_named(tmp_path, keys: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(AQUILA_7B | keys))
    with pytest.raises(UserError) as error:
        load_model_config(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)


def test_missing_folder_lists_its_neighbours(tmp_path) -> None:
    (tmp_path / "aquila-7b").mkdir()
    with pytest.raises(UserError, match=r"aquila-7 does not exist.*has: aquila-7b"):
        load_model_config(tmp_path / "aquila-7")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model_config(tmp_path / "aquila-7b")


def test_broken_json_names_the_line(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{\n"dim": 64,\n"n_heads" 4}')
    with pytest.raises(UserError, match="line 3"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 64, "dim": 128}')
    with pytest.raises(UserError, match="'dim' stands twice"):
        load_model_config(tmp_path)


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"factor": 2.0}, "rope_scaling.rope_type: Field required"),
        ({"rope_type": "ntk", "factor": 2.0}, "rope_scaling.rope_type: input should be 'linear', 'dynamic'"),
        ({"rope_type": "linear"}, "rope_scaling.factor: Field required"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor: input should be a valid number"),
        ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor"),
        ({**YARN, "beta_fas": 3.0}, "unknown key 'rope_scaling.beta_fas'; did you mean 'beta_fast'?"),
        ({"rope_type": "yarn", "factor": 2.0}, "yarn needs original_max_position_embeddings"),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic needs original_max_position_embeddings"),
        ({**YARN, "rope_type": "llama3"}, "llama3 needs low_freq_factor"),
        ({**YARN, "low_freq_factor": 1.0}, "low_freq_factor has no meaning for rope_type yarn"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast has no meaning"),
        ({**YARN, "beta_fast": 1.0}, "beta_slow 1 must be below beta_fast 1"),
        (
            {**YARN, "rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "low_freq_factor 4 must be below high_freq_factor 1",
        ),
        ("yarn", "rope_scaling"),
    ],
)
def test_mistakes_in_rope_scaling_are_named(tmp_path, scaling, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(AQUILA_7B | {"rope_scaling": scaling}))
    with pytest.raises(UserError) as error:
        load_model_config(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)


def test_what_decides_the_function_is_the_same_however_it_is_written() -> None:
    plain = ModelConfig(**AQUILA_7B)
    assert plain.function() == ModelConfig(**AQUILA_7B, n_kv_heads=32, rope_theta=1e4).function()
    scaled = ModelConfig(**AQUILA_7B, rope_scaling=YARN)
    assert scaled.function() == ModelConfig(**scaled.model_dump()).function() != plain.function()
    assert scaled.function()["rope_scaling"] == YARN


def test_a_multiplier_beyond_all_reason_is_refused():
    with pytest.raises(ValueError, match="ffn_dim_multiplier"):
        ModelConfig(dim=32, n_heads=4, ffn_dim_multiplier=1e308)
