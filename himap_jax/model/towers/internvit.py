"""The tower of InternVL, InternViT; its embeddings are those of DINOv2. Axes: as in `common`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.model.linear import Linear, RMSNorm
from himap_jax.model.towers import common

QK_NORM_EPSILON = 1e-6


class InternAttention(common.TowerModule):
  """Self-attention whose queries and keys may be normalised over all heads together."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], common.QueryKey]:
    query, key, value = common.query_key_value(x, self.config, self.kernels, ("q_proj", "k_proj", "v_proj"))
    if self.config.qk_norm:
      query, key = (
        RMSNorm(QK_NORM_EPSILON, name=name)(y.reshape(x.shape)).reshape(y.shape)
        for name, y in (("q_norm", query), ("k_norm", key))
      )
    y = self.kernels.attention(query, key, value).reshape(x.shape)
    axes = (None, "tower_heads")
    output = Linear(self.config.hidden_size, self.kernels, use_bias=True, axes=axes, name="projection_layer")
    return output(y), (query, key)


class InternLayer(common.TowerModule):
  """An encoder layer of InternViT."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], common.QueryKey]:
    c, k = self.config, self.kernels
    y, query_key = InternAttention(c, k, name="attention")(common.norm(c, "layernorm_before")(x))
    x = x + self._scale("lambda_1", x) * y
    y = common.FeedForward(c, k, name="mlp")(common.norm(c, "layernorm_after")(x))
    return x + self._scale("lambda_2", x) * y, query_key

  def _scale(self, name: str, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return jnp.broadcast_to(self.param(name, nn.initializers.ones, x.shape[-1:]).astype(x.dtype), x.shape)
