"""The towers of CLIP, SigLIP and Qwen-VL (an OpenCLIP ViT). Axes: as in `common`."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.model.linear import INIT_NORMAL, Embedding, LayerNorm, Linear
from himap_jax.model.towers import common


class ClipAttention(common.TowerModule):
  """Self-attention of CLIP and SigLIP."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], common.QueryKey]:
    query, key, value = common.query_key_value(x, self.config, self.kernels, ("q_proj", "k_proj", "v_proj"))
    output = Linear(self.config.hidden_size, self.kernels, use_bias=True, axes=(None, "tower_heads"), name="out_proj")
    y = output(self.kernels.attention(query, key, value).reshape(x.shape))
    return y, (query, key)


class ClipLayer(common.TowerModule):
  """An encoder layer of CLIP and SigLIP."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], common.QueryKey]:
    epsilon = self.config.layer_norm_eps
    y, query_key = ClipAttention(self.config, self.kernels, name="self_attn")(LayerNorm(epsilon, name="layer_norm1")(x))
    x = x + y
    return x + common.FeedForward(self.config, self.kernels, name="mlp")(
      LayerNorm(epsilon, name="layer_norm2")(x)
    ), query_key


class ClipEmbeddings(common.TowerModule):
  """Patch, position and (CLIP only) class embeddings."""

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B S D"]:
    config = self.config
    width, patch = config.hidden_size, config.patch_size
    x = common.PatchEmbedding(width, patch, use_bias=config.patch_bias, name="patch_embedding")(pixel_values)
    num_positions = (config.image_size // patch) ** 2 + config.has_class_token
    positions = Embedding(num_positions, width, self.kernels, name="position_embedding")(
      jnp.arange(num_positions)
    ).astype(x.dtype)
    grid = positions[int(config.has_class_token) :]
    x = x + common.resize_positions(grid, pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)[None]
    if config.has_class_token:
      class_token = self.param("class_embedding", INIT_NORMAL, (width,)).astype(x.dtype)
      x = common.prepend(class_token + positions[0], x)
    return x
