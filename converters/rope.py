"""Rotary positions: how a config describes them, and how llama.cpp wants to be told."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from gguf.constants import Keys, RopeScalingType

from edgemoe.converters.checkpoint import Floats
from edgemoe.converters.gguf_file import Value
from edgemoe.converters.model_config import ModelConfig
from edgemoe.converters.values import f32, text, u32
from edgemoe.gguf_header import show

__all__ = ["rope_factors", "rope_keys"]


def rope_keys(config: ModelConfig) -> Mapping[str, Value]:
    """Give the metadata of rotary positions; keys without the architecture's name.

    Raises
    ------
    ConvertError
        If llama.cpp does not compute them so.
    """
    keys = {Keys.Rope.FREQ_BASE: f32(config.rope("rope_theta"))}
    kind = config.rope_type
    if kind in ("default", "llama3"):
        return keys
    if kind not in ("linear", "yarn"):
        config.refuse(f"stretches positions by {show(kind)}, which cannot be converted; known are linear, yarn, llama3")
    factor = config.rope("factor")
    keys[Keys.Rope.SCALING_TYPE] = text(RopeScalingType[kind.upper()].value)
    keys[Keys.Rope.SCALING_FACTOR] = f32(factor)
    if kind == "yarn":
        keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = u32(int(config.rope("original_max_position_embeddings", high=2**31)))
        for name, key in (
            ("beta_fast", Keys.Rope.SCALING_YARN_BETA_FAST),
            ("beta_slow", Keys.Rope.SCALING_YARN_BETA_SLOW),
        ):
            value = config.rope(name, default=None)
            if value is not None:
                keys[key] = f32(value)
        # llama.cpp computes it from the factor alone.
        attention, usual = config.rope("attention_factor", default=None), 1 + 0.1 * math.log(factor)
        if attention is not None and not math.isclose(attention, usual, rel_tol=1e-3):
            config.refuse(f"has attention_factor {attention}, but llama.cpp has {usual:.4f}; it cannot be converted")
    return keys


def rope_factors(config: ModelConfig, rope_dim: int) -> Floats | None:
    """Give divisors of the rotary frequencies, float32 [rope_dim / 2], where Llama 3's way of stretching is used."""
    if config.rope_type != "llama3":
        return None
    frequency = config.rope("rope_theta") ** (-np.arange(0, rope_dim, 2) / rope_dim)
    factor, original = config.rope("factor"), config.rope("original_max_position_embeddings")
    low, high = config.rope("low_freq_factor"), config.rope("high_freq_factor")
    if high < low:
        config.refuse(f"has a high_freq_factor of {high}, expected at least {low}; correct it")
    # Of turns within the original context: many stay as they are, few are slowed down, between them it is blended.
    kept = np.clip((original * frequency / (2 * math.pi) - low) / max(high - low, 1e-9), 0, 1)
    return np.asarray(1 / (kept + (1 - kept) / factor), np.float32)
