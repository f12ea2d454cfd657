"""Typed, strict configuration: model `config.json`, run YAML, `deepspeed.json`, overrides."""

from aquila.config.model import ModelConfig, load_model_config

__all__ = ["ModelConfig", "load_model_config"]
