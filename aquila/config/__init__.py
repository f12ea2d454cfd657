"""Typed, strict configuration: model `config.json`, run YAML, `deepspeed.json`, overrides.

One rule: defaults < deepspeed.json < YAML < key=value; the later wins, and the start-up table says
what it overrode.
"""

from aquila.config.effective import Device, EffectiveConfig, find_model_dir, load_run_config
from aquila.config.model import ModelConfig, load_model_config
from aquila.config.run import RunConfig, parse_blend, parse_split

__all__ = [
    "Device",
    "EffectiveConfig",
    "ModelConfig",
    "RunConfig",
    "find_model_dir",
    "load_model_config",
    "load_run_config",
    "parse_blend",
    "parse_split",
]
