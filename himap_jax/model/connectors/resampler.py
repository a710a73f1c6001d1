"""Learned queries that attend to all features of a picture.

Axes: B batch, P features, N queries (image tokens), F width of the features, D width of the decoder, H head dim.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.model.config import ResamplerConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import INIT_NORMAL, LayerNorm, Linear
from himap_jax.model.towers.common import resize_positions


class Resampler(nn.Module):
  """Qwen-VL's connector (Bai et al., arXiv 2308.12966): one cross-attention, a norm and a linear map."""

  config: ResamplerConfig
  width: int
  kernels: Kernels

  @nn.compact
  def __call__(self, features: Float[Array, "B P F"]) -> Float[Array, "B N D"]:
    c, width, k = self.config, self.width, self.kernels
    batch, side = features.shape[0], round(features.shape[1] ** 0.5)
    x = LayerNorm(c.layer_norm_eps, name="ln_kv")(Linear(width, k, name="kv_proj")(features))
    query = self.param("query", INIT_NORMAL, (c.num_queries, width)).astype(x.dtype)
    positions = self.param("pos_embed", INIT_NORMAL, (c.num_queries, width)).astype(x.dtype)
    query = LayerNorm(c.layer_norm_eps, name="ln_q")(query) + positions
    key = x + resize_positions(positions, side, side)[None]
    y = CrossAttention(c, width, k, name="attn")(jnp.broadcast_to(query, (batch, *query.shape)), key, x)
    return Linear(width, k, name="proj")(LayerNorm(c.layer_norm_eps, name="ln_post")(y))


class CrossAttention(nn.Module):
  """Multi-head attention of queries to keys and values of their own."""

  config: ResamplerConfig
  width: int
  kernels: Kernels

  @nn.compact
  def __call__(
    self, query: Float[Array, "B N D"], key: Float[Array, "B P D"], value: Float[Array, "B P D"]
  ) -> Float[Array, "B N D"]:
    linear = functools.partial(Linear, self.width, self.kernels, use_bias=True)
    query, key, value = (
      linear(name=name)(x).reshape(*x.shape[:2], self.config.num_heads, -1)
      for name, x in (("q_proj", query), ("k_proj", key), ("v_proj", value))
    )
    context = self.kernels.attention(query, key, value)
    return linear(name="out_proj")(context.reshape(*context.shape[:2], self.width))
