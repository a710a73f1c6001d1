"""Rotary position embedding (Su et al., arXiv 2104.09864) with the scalings that LLaMA checkpoints use.

Axes: B batch, S sequence, A axes of positions (none for one), N heads, H head dim, R rotated features of a head.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from himap_jax.model.config import RopeConfig


def frequencies(config: RopeConfig, rotary_dim: int) -> np.ndarray:
  """Angular frequencies `[R/2]` in radians per position, equal to transformers' for the same `rope_parameters`."""
  exponent = (np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim).astype(np.float64)
  base = 1.0 / (config.theta**exponent).astype(np.float32)  # NumPy's float32 power rounds differently from torch's
  if config.rope_type == "linear":
    return (base / config.factor).astype(np.float32)
  if config.rope_type == "llama3":
    wavelength = 2 * math.pi * (1 / base)  # as torch divides a number by an array
    low = config.original_max_position_embeddings / config.low_freq_factor
    high = config.original_max_position_embeddings / config.high_freq_factor
    blend = (config.original_max_position_embeddings * (1 / wavelength) - config.low_freq_factor) / (
      config.high_freq_factor - config.low_freq_factor
    )
    middle = (1 - blend) * base / config.factor + blend * base
    scaled = np.where(wavelength > low, base / config.factor, np.where(wavelength < high, base, middle))
    return scaled.astype(np.float32)
  return base.astype(np.float32)


def rotation(
  config: RopeConfig, rotary_dim: int, positions: Int[Array, "B S *A"]
) -> tuple[Float[Array, "B S 1 R"], Float[Array, "B S 1 R"]]:
  """Cosine and sine of every position in float32; computed once and shared by all layers."""
  frequency = jnp.asarray(frequencies(config, rotary_dim))
  if positions.ndim == 2:
    angle = jnp.einsum("BS,F->BSF", positions.astype(jnp.float32), frequency)
  else:
    axis = axis_of_frequency(config.sections, interleaved=config.interleaved)
    angle = jnp.einsum("BSF,F->BSF", positions[:, :, axis].astype(jnp.float32), frequency)
  angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def axis_of_frequency(sections: tuple[int, ...], *, interleaved: bool) -> np.ndarray:
  """The axis of the position that each frequency turns by, `[R/2]`; `sections` counts the frequencies of every axis.

  Axes have consecutive frequencies (Qwen2-VL, arXiv 2409.12191), or take turns until their sections are used up, and the
  rest goes to the first (Qwen3-VL).
  """
  axis = np.repeat(np.arange(len(sections)), sections)
  if interleaved:
    axis = np.zeros(sum(sections), np.int64)
    for number, count in enumerate(sections[1:], start=1):
      axis[number : count * len(sections) : len(sections)] = number
  return axis


def rotate(
  x: Float[Array, "B S N H"], cos: Float[Array, "B S 1 R"], sin: Float[Array, "B S 1 R"]
) -> Float[Array, "B S N H"]:
  """Rotates the pairs (i, i + R/2) of every head; features from R on stay as they are."""
  rotary_dim = cos.shape[-1]
  if rotary_dim < x.shape[-1]:
    return jnp.concatenate([rotate(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]], axis=-1)
  first, second = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return x * cos.astype(x.dtype) + turned * sin.astype(x.dtype)
