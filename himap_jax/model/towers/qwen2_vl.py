"""The towers of Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL, for pictures of any size.

Axes: B batch, P patches of a row's pictures, S squares of patches, F features of a square, D width, N heads, H head dim,
R rotated features of a head, A row and column.

The patches of a square that becomes an image token follow each other. All else is decided by coordinates (picture, row,
column), so that a row's pictures may have any sizes; padding, whose coordinates are −1, sees only itself.
"""

import itertools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from himap_jax.inputs import Images
from himap_jax.model import rope
from himap_jax.model.config import PatchVisionConfig, RopeConfig
from himap_jax.model.linear import ACTIVATIONS, Embedding, Linear
from himap_jax.model.towers import common
from himap_jax.model.tracing import traced_once

Rotation = tuple[Float[Array, "B P 1 R"], Float[Array, "B P 1 R"]]


def window_of(coordinates: Int[Array, "B P 3"], size: int) -> Int[Array, "B P"]:
  """A number for every window of `size` × `size` patches of a row's pictures; −1 for padding."""
  picture, row, column = (coordinates[:, :, axis] for axis in range(3))
  most = coordinates.shape[1] // size + 1  # windows along a side of a picture
  return jnp.where(picture < 0, -1, (picture * most + row // size) * most + column // size)


def axial_rotation(config: PatchVisionConfig, coordinates: Int[Array, "B P 3"]) -> Rotation:
  """Cosine and sine in float32: half of a head's frequencies turn by the row, the others by the column."""
  head_dim = config.hidden_size // config.num_attention_heads
  frequency = jnp.asarray(rope.frequencies(RopeConfig(config.rope_theta), head_dim // 2))
  angle = jnp.einsum("BPA,F->BPAF", coordinates[:, :, 1:].astype(jnp.float32), frequency)
  angle = angle.reshape(*coordinates.shape[:2], 1, head_dim // 2)
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


class PositionEmbedding(common.TowerModule):
  """A learned square grid of positions, stretched over each picture from corner to corner (bilinear)."""

  @nn.compact
  def __call__(self, coordinates: Int[Array, "B P 3"]) -> Float[Array, "B P D"]:
    side = self.config.image_size // self.config.patch_size
    table = Embedding(side**2, self.config.hidden_size, self.kernels, name="pos_embed")
    picture, places = coordinates[:, :, 0], coordinates[:, :, 1:]
    in_picture = picture[:, :, None] == picture[:, None]
    last = jnp.where(in_picture[..., None], places[:, None], 0).max(axis=2, initial=0)
    place = jnp.maximum(places, 0).astype(jnp.float32) * (side - 1) / jnp.maximum(last, 1).astype(jnp.float32)
    first = jnp.floor(place)
    far = place - first
    first, weights = first.astype(jnp.int32), (1 - far, far)
    total = jnp.zeros((*coordinates.shape[:2], self.config.hidden_size), jnp.float32)
    for down, right in itertools.product((0, 1), repeat=2):
      row, column = (jnp.minimum(first[..., axis] + step, side - 1) for axis, step in enumerate((down, right)))
      weight = weights[down][..., :1] * weights[right][..., 1:]
      total = total + table(row * side + column).astype(jnp.float32) * weight
    return total


class QwenAttention(common.TowerModule):
  """Self-attention within groups of patches."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "B P D"], rotation: Rotation, segments: Int[Array, "B P"]
  ) -> tuple[Float[Array, "B P D"], Float[Array, "B P N H"]]:
    query, key, value = common.query_key_value(x, self.config, self.kernels, ("q_proj", "k_proj", "v_proj"))
    query, key = (rope.rotate(y.astype(jnp.float32), *rotation).astype(x.dtype) for y in (query, key))
    y = self.kernels.attention(query, key, value, segments=segments) if x.shape[1] else value
    output = Linear(self.config.hidden_size, self.kernels, use_bias=True, axes=(None, "tower_heads"), name="proj")
    return output(y.reshape(x.shape)), key


class GatedFeedForward(common.TowerModule):
  """The gated feed-forward of Qwen2.5-VL."""

  @nn.compact
  def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
    c, k = self.config, self.kernels
    gate, up = (
      Linear(c.intermediate_size, k, use_bias=True, axes=("tower_feed_forward", None), name=name)(x)
      for name in ("gate_proj", "up_proj")
    )
    down = Linear(c.hidden_size, k, use_bias=True, axes=(None, "tower_feed_forward"), name="down_proj")
    return down(ACTIVATIONS[c.hidden_act](gate) * up)


class QwenLayer(common.TowerModule):
  """A layer; returns the keys of its attention too."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "B P D"], rotation: Rotation, segments: Int[Array, "B P"]
  ) -> tuple[Float[Array, "B P D"], Float[Array, "B P N H"]]:
    c, k = self.config, self.kernels
    feed_forward = GatedFeedForward if c.is_gated else common.FeedForward
    y, key = QwenAttention(c, k, name="attn")(common.norm(c, "norm1")(x), rotation, segments)
    x = x + y
    return x + feed_forward(c, k, name="mlp")(common.norm(c, "norm2")(x)), key


class PatchTower(common.TowerModule):
  """Patches of pictures to the features of their squares."""

  @nn.compact
  def __call__(self, images: Images) -> common.TowerOutput:
    """The output for every row, `[B, S, …]`."""
    c, k, coordinates = self.config, self.kernels, images.coordinates
    batch, num_patches, _ = images.pixels.shape
    patches = images.pixels.reshape(-1, 3, c.patch_size, c.patch_size)
    x = common.PatchEmbedding(c.hidden_size, c.patch_size, use_bias=c.patch_bias, name="patch_embed")(patches)
    x = x.reshape(batch, num_patches, c.hidden_size)
    if c.has_position_embedding:
      x = x + PositionEmbedding(c, k, name="embeddings")(coordinates).astype(x.dtype)
    rotation, picture = axial_rotation(c, coordinates), coordinates[:, :, 0]
    window = picture if c.window_size is None else window_of(coordinates, c.window_size)

    def merge(x: Float[Array, "B P D"]) -> Float[Array, "B S F"]:
      return x.reshape(batch, num_patches // c.merge_size**2, c.num_features)

    layer, deepstack = traced_once(QwenLayer), []
    for index in range(c.num_layers_run):
      segments = picture if index in c.full_attention_layers else window
      x, key = layer(c, k, name=f"layers_{index}")(x, rotation, segments)
      if index in c.deepstack_layers:
        deepstack.append(merge(x))
    keys = key.reshape(batch, -1, c.merge_size**2, *key.shape[2:]).mean(axis=2)
    return common.TowerOutput(merge(x), None, keys, deepstack=tuple(deepstack))
