"""Rotary embedding in Hugging Face's config.json: `rope_theta` and `rope_scaling`, or `rope_parameters`.

Before transformers 5 the base stood beside a `rope_scaling`; since then both are in `rope_parameters`, whose
base counts. What the two agree on is read either way and written the old way, which both understand.
"""

from typing import Any

from aquila.config import ModelConfig
from aquila.core.errors import UserError
from aquila.model.hf_values import Reader

_ORIGINAL = "original_max_position_embeddings"
_KINDS = ("linear", "dynamic", "yarn", "llama3")


def rope_from_hf(read: Reader) -> dict[str, Any]:
    """Our `rope_theta`, `rope_scaling` and `max_seq_len` of a Hugging Face `config.json`.

    Raises `UserError` for a kind of scaling that is not one of ours and for values that are none.
    """
    where, longest = read.where, read.size("max_position_embeddings", 2048)
    given = {**read.table("rope_scaling"), **read.table("rope_parameters")}
    inner = Reader(
        {key: value for key, value in given.items() if value is not None}, f"{where}: rope_parameters"
    )
    theta = inner.number("rope_theta", read.number("rope_theta", 10000.0))
    ours: dict[str, Any] = {"rope_theta": theta, "max_seq_len": longest}
    if inner.number("partial_rotary_factor", read.number("partial_rotary_factor", 1.0)) != 1:
        raise UserError(f"{where}: partial_rotary_factor: in Aquila's architecture all of a head turns")
    keys = {k: v for k, v in inner.values.items() if k not in ("rope_theta", "partial_rotary_factor", "type")}
    kind = keys.setdefault("rope_type", inner.values.get("type", "default"))
    if kind == "default" or (kind == "linear" and inner.number("factor", 0.0) == 1):
        return ours
    if kind not in _KINDS:
        raise UserError(f"{where}: rope_type {kind!r} is not one of default, {', '.join(_KINDS)}")
    if kind in ("yarn", "llama3"):
        # The model's own key goes first, and its longest context stands in where there is none.
        original = read.size("original_max_position_embeddings", keys.get(_ORIGINAL, longest))
        keys[_ORIGINAL] = original
    if kind == "dynamic":  # there, max_position_embeddings is the context before it was stretched
        keys[_ORIGINAL] = longest
        ours["max_seq_len"] = int(longest * inner.number("factor", 1.0))
    return {**ours, "rope_scaling": keys}


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The keys of a Hugging Face `config.json`: the inverse of `rope_from_hf`."""
    theirs: dict[str, Any] = {"rope_theta": config.rope_theta, "max_position_embeddings": config.max_seq_len}
    if config.rope_scaling is None:
        return theirs
    scaling = config.rope_scaling.to_dict()
    if config.rope_scaling.rope_type == "dynamic":
        theirs["max_position_embeddings"] = scaling.pop(_ORIGINAL)
    return {**theirs, "rope_scaling": scaling}
