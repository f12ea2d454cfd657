"""Scaled rotary embedding: the keys of `rope_scaling` in a model folder's `config.json`."""

import math
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from aquila.config.strict import StrictModel

_OWN = {
    "linear": (),
    "dynamic": ("original_max_position_embeddings",),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
"""The keys of each kind besides `rope_type` and `factor`."""
_NEEDED = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


class RopeScaling(StrictModel):
    """How angles are stretched beyond the context of the first training. Keys are those of Hugging Face.

    linear: positions are divided by `factor` (arXiv 2306.15595). dynamic: beyond the original context the
    base grows with the length of the sequence ("NTK-aware"). yarn: slow pairs are interpolated, fast ones
    are not, and cosines and sines are multiplied (arXiv 2309.00071). llama3: the same idea, cut by wavelength
    (arXiv 2407.21783, section 3.4.2, and Llama 3.1's released code).
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float = Field(ge=1)
    """By how much the context is stretched."""
    original_max_position_embeddings: PositiveInt | None = None
    """Longest context of the training before it was stretched, in tokens."""
    low_freq_factor: float | None = Field(None, gt=0)
    """llama3: pairs of a wavelength above original / this are interpolated."""
    high_freq_factor: float | None = Field(None, gt=0)
    """llama3: pairs of a wavelength below original / this stay as they are."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: pairs that turn more often than this within the original context stay as they are."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: pairs that turn less often than this are interpolated."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: of cosines and sines, outright."""
    mscale: float | None = Field(None, gt=0)
    """yarn: with `mscale_all_dim`, the attention factor as a quotient, as DeepSeek has it."""
    mscale_all_dim: float | None = Field(None, gt=0)
    truncate: bool = True
    """yarn: the range of pairs between the two is rounded to whole pairs."""

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> "RopeScaling":
        own = _OWN[self.rope_type]
        for key in self.to_dict().keys() - {"rope_type", "factor", *own}:
            raise ValueError(f"{key} has no meaning for rope_type {self.rope_type}; leave it out")
        for key in own:
            if key in _NEEDED and getattr(self, key) is None:
                raise ValueError(f"rope_type {self.rope_type} needs {key}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"beta_slow {self.beta_slow:g} must be below beta_fast {self.beta_fast:g}")
        return self

    @property
    def original(self) -> int:
        """`original_max_position_embeddings` of the kinds that need it."""
        assert self.original_max_position_embeddings is not None
        return self.original_max_position_embeddings

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by: for yarn 0.1 ln(factor) + 1, unless said otherwise."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0

    def to_dict(self) -> dict[str, object]:
        """The keys that are not at their defaults, as they stand in a `config.json`."""
        return self.model_dump(exclude_defaults=True)
