"""Common parts of vision towers: patches, position grids, feed-forward, attention of the class token.

Axes: B batch, P patches, S tower tokens (patches and, if there is one, the class token), D width, N heads, H head dim.
Module names are those of the checkpoints.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from himap_jax.inputs import pytree
from himap_jax.model.config import VisionConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import ACTIVATIONS, INIT_NORMAL, NORMS, Linear


@pytree
class TowerOutput:
  """Tower output for a batch of images.

  Attributes:
    features: input of the connector, one vector per image token; zeros for newlines, like the next two.
    class_attention: float32 attention of the class token to every image token in the last layer run, averaged over
      heads and over the patches of the token; None without a class token.
    keys: that layer's keys of the image tokens, by head, averaged over the patches of the token.
    grid: tile of the row, row and column of every feature, zeros for newlines; None if the features are no grids.
    is_newline: which image tokens are learned newlines; None if none are.
    deepstack: features of the layers in `VisionConfig.deepstack_layers`.
  """

  features: Float[Array, "B P F"]
  class_attention: Float[Array, "B P"] | None
  keys: Float[Array, "B P N H"]
  grid: Int[Array, "B P 3"] | None = None
  is_newline: Bool[Array, "B P"] | None = None
  deepstack: tuple[Float[Array, "B P F"], ...] = ()


class TowerModule(nn.Module):
  """A part of a tower."""

  config: VisionConfig
  kernels: Kernels


def group(output: TowerOutput, columns: int, size: int) -> TowerOutput:
  """Makes one token of every `size` × `size` patches of pictures with `columns` of them in a row.

  The features of the patches are concatenated, row by row; attention and keys are averaged.
  """

  def by_token(x: Shaped[Array, "B P *D"]) -> Shaped[Array, "B Q p *D"]:
    x = x.reshape(x.shape[0], -1, size, columns // size, size, *x.shape[2:])
    return jnp.moveaxis(x, 2, 3).reshape(x.shape[0], -1, size**2, *x.shape[5:])

  features = by_token(output.features)
  return TowerOutput(
    features=features.reshape(*features.shape[:2], -1),
    class_attention=None if output.class_attention is None else by_token(output.class_attention).mean(axis=2),
    keys=by_token(output.keys).mean(axis=2),
  )


# Queries and keys of a layer.
QueryKey = tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]


def bicubic_weights(source: int, target: int) -> np.ndarray:
  """`[target, source]` matrix of a bicubic resize, equal to torch's `interpolate(mode="bicubic", align_corners=False)`.

  Keys' kernel with a = −0.75, half-pixel centres, borders repeated, no antialiasing.
  """
  a = -0.75
  centre = (np.arange(target) + 0.5) * (source / target) - 0.5
  first = np.floor(centre).astype(int)
  weights = np.zeros((target, source))
  for tap in range(-1, 3):
    x = np.abs(centre - (first + tap))
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(x <= 1, near, far))
  return weights.astype(np.float32)


def resize_positions(positions: Float[Array, "P D"], height: int, width: int) -> Float[Array, "Q D"]:
  """Resizes a square grid of position embeddings to `height` × `width` patches, in float32."""
  side = round(positions.shape[0] ** 0.5)
  if (height, width) == (side, side):
    return positions
  grid = positions.astype(jnp.float32).reshape(side, side, -1)
  rows, columns = bicubic_weights(side, height), bicubic_weights(side, width)
  resized = jnp.einsum("hr,wc,rcD->hwD", rows, columns, grid, precision="highest")
  return resized.reshape(height * width, -1).astype(positions.dtype)


def patchify(pixel_values: Float[Array, "B 3 h w"], patch: int) -> Float[Array, "B P F"]:
  """Cuts images into flattened patches, ordered (channel, row, column) like a convolution's weight."""
  batch, channels, height, width = pixel_values.shape
  rows, columns = height // patch, width // patch
  x = pixel_values[:, :, : rows * patch, : columns * patch]
  x = x.reshape(batch, channels, rows, patch, columns, patch)
  return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


class PatchEmbedding(nn.Module):
  """A strided convolution as one product over flattened patches; its weight is `[D, 3, patch, patch]`."""

  features: int
  patch_size: int
  use_bias: bool

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B P D"]:
    shape = (self.features, 3, self.patch_size, self.patch_size)
    weight = self.param("weight", INIT_NORMAL, shape)
    patches = patchify(pixel_values, self.patch_size)
    kernel = weight.reshape(self.features, -1).astype(patches.dtype)
    x = jnp.einsum("BPF,DF->BPD", patches, kernel, preferred_element_type=jnp.float32).astype(patches.dtype)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      x = x + jnp.broadcast_to(bias.astype(x.dtype), x.shape)
    return x


def query_key_value(
  x: Float[Array, "B S D"], config: VisionConfig, kernels: Kernels, names: tuple[str, str, str]
) -> tuple[Float[Array, "B S N H"], ...]:
  """Queries, keys and values by head, from linear layers with these names in the calling module."""
  linear = functools.partial(Linear, config.hidden_size, kernels, use_bias=config.qkv_bias, axes=("tower_heads", None))
  heads = config.num_attention_heads, config.hidden_size // config.num_attention_heads
  return tuple(linear(name=name)(x).reshape(*x.shape[:2], *heads) for name in names)


def norm(config: VisionConfig, name: str) -> nn.Module:
  """The normalisation before a layer's attention or feed-forward."""
  return NORMS[config.norm_type](config.layer_norm_eps, name=name)


class FeedForward(TowerModule):
  """The two-layer feed-forward of all towers."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    c, k = self.config, self.kernels
    x = Linear(c.intermediate_size, k, use_bias=True, axes=("tower_feed_forward", None), name="fc1")(x)
    x = ACTIVATIONS[c.hidden_act](x)
    return Linear(c.hidden_size, k, use_bias=True, axes=(None, "tower_feed_forward"), name="fc2")(x)


def prepend(token: Float[Array, "D"], x: Float[Array, "B P D"]) -> Float[Array, "B S D"]:
  """Prepends a token to the patches."""
  first = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2]))
  return jnp.concatenate([first, x], axis=1)


def pooled(x: Float[Array, "B P *D"], columns: int, side: int) -> Float[Array, "B Q *D"]:
  """The mean over every square of `side` × `side` patches of a grid with so many columns, in float32."""
  squares = x.astype(jnp.float32).reshape(x.shape[0], -1, side, columns // side, side, *x.shape[2:])
  return squares.mean(axis=(2, 4)).reshape(x.shape[0], -1, *x.shape[2:]).astype(x.dtype)


def class_attention(query: Float[Array, "B S N H"], key: Float[Array, "B S N H"]) -> Float[Array, "B S"]:
  """Attention probabilities of the first token, averaged over heads."""
  logits = jnp.einsum("BNH,BSNH->BNS", query[:, 0], key, preferred_element_type=jnp.float32)
  return jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1).mean(axis=1)
