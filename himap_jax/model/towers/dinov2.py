"""The tower of DINOv2. Axes: as in `common`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.model.linear import INIT_NORMAL, LayerNorm, Linear
from himap_jax.model.towers import common


class DinoAttention(common.TowerModule):
  """Attention with the module names of a DINOv2 checkpoint."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], common.QueryKey]:
    y, query_key = DinoSelfAttention(self.config, self.kernels, name="attention")(x)
    return DinoOutput(self.config, self.kernels, name="output")(y), query_key


class DinoSelfAttention(common.TowerModule):
  """Self-attention of DINOv2 without its output layer."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], common.QueryKey]:
    query, key, value = common.query_key_value(x, self.config, self.kernels, ("query", "key", "value"))
    return self.kernels.attention(query, key, value).reshape(x.shape), (query, key)


class DinoOutput(common.TowerModule):
  """The output layer of DINOv2's attention."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return Linear(self.config.hidden_size, self.kernels, use_bias=True, axes=(None, "tower_heads"), name="dense")(x)


class LayerScale(nn.Module):
  """A learned scale per channel."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    scale = self.param("lambda1", nn.initializers.ones, (x.shape[-1],))
    return x * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


class DinoLayer(common.TowerModule):
  """An encoder layer of DINOv2."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], common.QueryKey]:
    epsilon = self.config.layer_norm_eps
    y, query_key = DinoAttention(self.config, self.kernels, name="attention")(LayerNorm(epsilon, name="norm1")(x))
    x = x + LayerScale(name="layer_scale1")(y)
    y = common.FeedForward(self.config, self.kernels, name="mlp")(LayerNorm(epsilon, name="norm2")(x))
    return x + LayerScale(name="layer_scale2")(y), query_key


class DinoPatchEmbeddings(common.TowerModule):
  """DINOv2's patch embedding."""

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B P D"]:
    width, patch = self.config.hidden_size, self.config.patch_size
    return common.PatchEmbedding(width, patch, use_bias=True, name="projection")(pixel_values)


class DinoEmbeddings(common.TowerModule):
  """Patch, position and class embeddings; the position grid is resized to the image."""

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B S D"]:
    width, patch = self.config.hidden_size, self.config.patch_size
    x = DinoPatchEmbeddings(self.config, self.kernels, name="patch_embeddings")(pixel_values)
    num_positions = (self.config.image_size // patch) ** 2 + 1
    positions = self.param("position_embeddings", INIT_NORMAL, (1, num_positions, width))[0]
    class_token = self.param("cls_token", INIT_NORMAL, (1, 1, width))[0, 0]
    grid = common.resize_positions(positions[1:], pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    return common.prepend((class_token + positions[0]).astype(x.dtype), x + grid[None].astype(x.dtype))
