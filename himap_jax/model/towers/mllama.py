"""The tower of Llama-3.2-Vision (arXiv 2407.21783, section 7; transformers' `MllamaVisionModel`).

A picture is cut into up to four tiles, and the rest of the four is padding; every tile gets a class token, and padding
up to a multiple of 8 tokens. All tokens of a picture form one sequence. As in transformers, only padding is hidden from
padding: patches read the tokens of padding too, so that all four tiles must be computed. Padding tiles have features.

Axes: I pictures, t tiles of a picture, n tokens of a tile, S tokens of a picture with padding; otherwise as in `common`.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import Images
from himap_jax.model.config import TilingConfig
from himap_jax.model.linear import INIT_NORMAL, Embedding, LayerNorm, Linear
from himap_jax.model.towers import common
from himap_jax.model.tracing import traced_once

MULTIPLE = 8
NORM_EPSILON = 1e-5  # of the norms outside the layers


class MllamaTower(common.TowerModule):
  """Tiles to the connector's input: the last hidden states, and the feature layers' with their channels interleaved."""

  @nn.compact
  def __call__(self, images: Images) -> common.TowerOutput:
    """The output for every tile, `[B·P, n, …]`; class tokens see a tile's surroundings, so there is no attention of one."""
    c, k = self.config, self.kernels
    tiles = c.tiling.max_num_tiles
    pixels = images.pixels.reshape(-1, *images.pixels.shape[2:])
    places = images.coordinates.reshape(-1, tiles, 3)
    arrangement = arrangements(places, c.tiling)
    x = common.PatchEmbedding(c.hidden_size, c.patch_size, use_bias=False, name="patch_embedding")(pixels)
    x = _by_picture(x, tiles)
    x = TileEmbedding(c, k, name="pre_tile_positional_embedding")(x, arrangement)
    class_token = self.param("class_embedding", INIT_NORMAL, (c.hidden_size,)).astype(x.dtype)
    x = _by_picture(common.prepend(class_token, x.reshape(-1, *x.shape[2:])), tiles)
    x = PositionEmbedding(c, k, name="gated_positional_embedding")(x, arrangement)
    x = LayerNorm(NORM_EPSILON, name="layernorm_pre")(x)
    count = x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -count % MULTIPLE), (0, 0)))
    slots = x.shape[2]
    is_used = (places[:, :, :1] >= 0) & (jnp.arange(slots) < count)[None, None]
    is_used = is_used.reshape(-1, tiles * slots)
    mask = (is_used[:, :, None] | is_used[:, None])[:, None]
    num_local = c.num_hidden_layers - c.tiling.num_global_layers
    local, _ = MllamaEncoder(c, k, num_local, name="transformer")(_joined(x), mask)
    x = _split(LayerNorm(NORM_EPSILON, name="layernorm_post")(local[-1]), tiles)
    x = TileEmbedding(c, k, name="post_tile_positional_embedding")(x, arrangement)
    states, key = MllamaEncoder(c, k, c.tiling.num_global_layers, True, name="global_transformer")(_joined(x), mask)
    *early, _ = c.feature_layers
    inner = jnp.stack([local[layer] for layer in early], axis=-1)
    features = jnp.concatenate([states[-1], inner.reshape(*inner.shape[:2], -1)], axis=-1)
    features, key = (y.reshape(-1, slots, *y.shape[2:])[:, :count] for y in (features, key))
    return common.TowerOutput(features, None, key)


class TileEmbedding(common.TowerModule):
  """Adds a gated vector for each tile, which depends on the arrangement."""

  @nn.compact
  def __call__(self, x: Float[Array, "I t n D"], arrangement: Int[Array, "I"]) -> Float[Array, "I t n D"]:
    tiling, width = self.config.tiling, x.shape[-1]
    table = Embedding(len(tiling.arrangements) + 1, tiling.max_num_tiles * width, self.kernels, name="embedding")
    own = table(arrangement).reshape(*x.shape[:2], 1, width)
    return x + own.astype(x.dtype) * gate(self, "gate", x)


class PositionEmbedding(common.TowerModule):
  """Adds a vector for each token of a tile, and one for each token of a picture; the gate weighs one against the other."""

  @nn.compact
  def __call__(self, x: Float[Array, "I t n D"], arrangement: Int[Array, "I"]) -> Float[Array, "I t n D"]:
    tiling, own = self.config.tiling, x.shape[1:]
    weight = gate(self, "gate", x)
    position = self.param("embedding", INIT_NORMAL, own[1:]).astype(x.dtype)
    table = Embedding(len(tiling.arrangements) + 1, int(np.prod(own)), self.kernels, name="tile_embedding")
    x = x + (1 - weight) * position[None, None]
    return x + weight * table(arrangement).reshape(x.shape).astype(x.dtype)


class MllamaEncoder(common.TowerModule):
  """Layers; returns all hidden states, the input first, and the last keys."""

  num_layers: int
  is_gated: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "I S D"], mask: Bool[Array, "I 1 S S"]
  ) -> tuple[list[Float[Array, "I S D"]], Float[Array, "I S N H"] | None]:
    layer, states, key = traced_once(MllamaLayer), [x], None
    for index in range(self.num_layers):
      x, key = layer(self.config, self.kernels, self.is_gated, name=f"layers_{index}")(x, mask)
      states.append(x)
    return states, key


class MllamaLayer(common.TowerModule):
  """An encoder layer; of a gated one, gates weigh what it adds."""

  is_gated: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "I S D"], mask: Bool[Array, "I 1 S S"]
  ) -> tuple[Float[Array, "I S D"], Float[Array, "I S N H"]]:
    c, k = self.config, self.kernels
    y, key = MllamaAttention(c, k, name="self_attn")(LayerNorm(c.layer_norm_eps, name="input_layernorm")(x), mask)
    x = x + self._gated("gate_attn", y)
    y = common.FeedForward(c, k, name="mlp")(LayerNorm(c.layer_norm_eps, name="post_attention_layernorm")(x))
    return x + self._gated("gate_ffn", y), key

  def _gated(self, name: str, y: Float[Array, "I S D"]) -> Float[Array, "I S D"]:
    return y * gate(self, name, y) if self.is_gated else y


class MllamaAttention(common.TowerModule):
  """Self-attention over all tiles of a picture."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "I S D"], mask: Bool[Array, "I 1 S S"]
  ) -> tuple[Float[Array, "I S D"], Float[Array, "I S N H"]]:
    query, key, value = common.query_key_value(x, self.config, self.kernels, ("q_proj", "k_proj", "v_proj"))
    y = self.kernels.attention(query, key, value, mask).reshape(x.shape)
    return Linear(x.shape[-1], self.kernels, axes=(None, "tower_heads"), name="o_proj")(y), key


def gate(module: nn.Module, name: str, x: Float[Array, "..."]) -> Float[Array, ""]:
  """The hyperbolic tangent of a learned number of a module, in the dtype of `x`."""
  return jnp.tanh(module.param(name, nn.initializers.zeros, (1,)).astype(x.dtype)[0])


def arrangements(places: Int[Array, "I t 3"], tiling: TilingConfig) -> Int[Array, "I"]:
  """The embedding of every picture's arrangement of tiles, 0 for none; `places` are the tiles' `Images.coordinates`."""
  table = np.zeros((tiling.max_num_tiles + 1,) * 2, np.int32)
  for number, arrangement in enumerate(tiling.arrangements, start=1):
    table[arrangement] = number
  rows, columns = (places[:, :, axis].max(axis=1) + 1 for axis in (1, 2))
  return jnp.asarray(table)[rows, columns]


def _by_picture(x: Float[Array, "P n D"], tiles: int) -> Float[Array, "I t n D"]:
  return x.reshape(-1, tiles, *x.shape[1:])


def _joined(x: Float[Array, "I t n D"]) -> Float[Array, "I S D"]:
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _split(x: Float[Array, "I S D"], tiles: int) -> Float[Array, "I t n D"]:
  return x.reshape(x.shape[0], tiles, -1, x.shape[-1])
