"""Vision towers: CLIP, SigLIP and DINOv2, up to the last feature layer that the model uses.

Axes: B batch, P patches, S tokens of the tower (patches and, where there is one, the class token), D width, N heads,
H head dim. Module names are those of the checkpoints.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from himap_jax.attention import Attend
from himap_jax.config import VisionConfig
from himap_jax.linear import ACTIVATIONS, Embedding, LayerNorm, Linear


@flax.struct.dataclass
class TowerOutput:
  """What the tower says of a batch of images.

  Attributes:
    features: what the projector reads, one vector an image token.
    class_attention: float32 attention of the class token to every image token in the last layer that the features need,
        averaged over heads; None where the tower has no class token.
    keys: that layer's keys of the image tokens, by head.
  """

  features: Float[Array, "B P F"]
  class_attention: Float[Array, "B P"] | None
  keys: Float[Array, "B P N H"]


QueryKey = tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]


def bicubic_weights(source: int, target: int) -> np.ndarray:
  """`[target, source]` matrix of a bicubic resize, as torch's `interpolate(mode="bicubic", align_corners=False)`.

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
  """Cuts images into flattened patches, ordered (channel, row, column) as a convolution's weight is."""
  batch, channels, height, width = pixel_values.shape
  rows, columns = height // patch, width // patch
  x = pixel_values[:, :, : rows * patch, : columns * patch]
  x = x.reshape(batch, channels, rows, patch, columns, patch)
  return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch * patch)


class PatchEmbedding(nn.Module):
  """The towers' strided convolution, as one product over flattened patches; its weight is `[D, 3, patch, patch]`."""

  features: int
  patch_size: int
  use_bias: bool

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B P D"]:
    shape = (self.features, 3, self.patch_size, self.patch_size)
    weight = self.param("weight", nn.initializers.normal(0.02), shape)
    patches = patchify(pixel_values, self.patch_size)
    kernel = weight.reshape(self.features, -1).astype(patches.dtype)
    x = jnp.einsum("BPF,DF->BPD", patches, kernel, preferred_element_type=jnp.float32).astype(patches.dtype)
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      x = x + jnp.broadcast_to(bias.astype(x.dtype), x.shape)
    return x


def _heads(x: Float[Array, "B S D"], num_heads: int) -> Float[Array, "B S N H"]:
  return x.reshape(*x.shape[:2], num_heads, -1)


class FeedForward(nn.Module):
  """The two-layer feed-forward of all towers."""

  config: VisionConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    x = Linear(self.config.intermediate_size, use_bias=True, axes=("tower_feed_forward", None), name="fc1")(x)
    x = ACTIVATIONS[self.config.hidden_act](x)
    return Linear(self.config.hidden_size, use_bias=True, axes=(None, "tower_feed_forward"), name="fc2")(x)


class ClipAttention(nn.Module):
  """Self-attention of CLIP and SigLIP."""

  config: VisionConfig
  attend: Attend

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], QueryKey]:
    width, heads = self.config.hidden_size, self.config.num_attention_heads
    query, key, value = (
      _heads(Linear(width, use_bias=True, axes=("tower_heads", None), name=name)(x), heads)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    output = Linear(width, use_bias=True, axes=(None, "tower_heads"), name="out_proj")
    y = output(self.attend(query, key, value).reshape(x.shape))
    return y, (query, key)


class ClipLayer(nn.Module):
  """An encoder layer of CLIP and SigLIP."""

  config: VisionConfig
  attend: Attend

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], QueryKey]:
    epsilon = self.config.layer_norm_eps
    y, query_key = ClipAttention(self.config, self.attend, name="self_attn")(LayerNorm(epsilon, name="layer_norm1")(x))
    x = x + y
    return x + FeedForward(self.config, name="mlp")(LayerNorm(epsilon, name="layer_norm2")(x)), query_key


class ClipEmbeddings(nn.Module):
  """Patch, position and (CLIP) class embeddings."""

  config: VisionConfig

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B S D"]:
    config = self.config
    width, patch = config.hidden_size, config.patch_size
    x = PatchEmbedding(width, patch, use_bias=not config.has_class_token, name="patch_embedding")(pixel_values)
    num_positions = (config.image_size // patch) ** 2 + config.has_class_token
    positions = Embedding(num_positions, width, name="position_embedding")(jnp.arange(num_positions)).astype(x.dtype)
    grid = positions[int(config.has_class_token) :]
    x = x + resize_positions(grid, pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)[None]
    if config.has_class_token:
      class_token = self.param("class_embedding", nn.initializers.normal(0.02), (width,)).astype(x.dtype)
      x = _prepend(class_token + positions[0], x)
    return x


class DinoAttention(nn.Module):
  """Attention with the names of a DINOv2 checkpoint."""

  config: VisionConfig
  attend: Attend

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], QueryKey]:
    y, query_key = DinoSelfAttention(self.config, self.attend, name="attention")(x)
    return DinoOutput(self.config, name="output")(y), query_key


class DinoSelfAttention(nn.Module):
  """Self-attention of DINOv2 before its output layer."""

  config: VisionConfig
  attend: Attend

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], QueryKey]:
    width, heads = self.config.hidden_size, self.config.num_attention_heads
    query, key, value = (
      _heads(Linear(width, use_bias=self.config.qkv_bias, axes=("tower_heads", None), name=name)(x), heads)
      for name in ("query", "key", "value")
    )
    return self.attend(query, key, value).reshape(x.shape), (query, key)


class DinoOutput(nn.Module):
  """The output layer of DINOv2's attention."""

  config: VisionConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return Linear(self.config.hidden_size, use_bias=True, axes=(None, "tower_heads"), name="dense")(x)


class LayerScale(nn.Module):
  """A learned scale of every channel."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    scale = self.param("lambda1", nn.initializers.ones, (x.shape[-1],))
    return x * jnp.broadcast_to(scale.astype(x.dtype), x.shape)


class DinoLayer(nn.Module):
  """An encoder layer of DINOv2."""

  config: VisionConfig
  attend: Attend

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], QueryKey]:
    epsilon = self.config.layer_norm_eps
    y, query_key = DinoAttention(self.config, self.attend, name="attention")(LayerNorm(epsilon, name="norm1")(x))
    x = x + LayerScale(name="layer_scale1")(y)
    y = FeedForward(self.config, name="mlp")(LayerNorm(epsilon, name="norm2")(x))
    return x + LayerScale(name="layer_scale2")(y), query_key


class DinoPatchEmbeddings(nn.Module):
  """DINOv2's patch embedding."""

  config: VisionConfig

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B P D"]:
    return PatchEmbedding(self.config.hidden_size, self.config.patch_size, use_bias=True, name="projection")(
      pixel_values
    )


class DinoEmbeddings(nn.Module):
  """Patch, position and class embeddings of DINOv2; the position grid is resized to the image."""

  config: VisionConfig

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> Float[Array, "B S D"]:
    width, patch = self.config.hidden_size, self.config.patch_size
    x = DinoPatchEmbeddings(self.config, name="patch_embeddings")(pixel_values)
    num_positions = (self.config.image_size // patch) ** 2 + 1
    positions = self.param("position_embeddings", nn.initializers.normal(0.02), (1, num_positions, width))[0]
    class_token = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, width))[0, 0]
    grid = resize_positions(positions[1:], pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
    return _prepend((class_token + positions[0]).astype(x.dtype), x + grid[None].astype(x.dtype))


def _prepend(token: Float[Array, "D"], x: Float[Array, "B P D"]) -> Float[Array, "B S D"]:
  first = jnp.broadcast_to(token, (x.shape[0], 1, x.shape[2]))
  return jnp.concatenate([first, x], axis=1)


class Encoder(nn.Module):
  """The first `num_layers` layers; returns the hidden state after each, the input first, and the last one's attention."""

  config: VisionConfig
  num_layers: int
  attend: Attend

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[list[Float[Array, "B S D"]], QueryKey]:
    layer, prefix = (DinoLayer, "layer") if self.config.model_type == "dinov2" else (ClipLayer, "layers")
    hidden_states, query_key = [x], None
    for index in range(self.num_layers):
      x, query_key = layer(self.config, self.attend, name=f"{prefix}_{index}")(x)
      hidden_states.append(x)
    return hidden_states, query_key


def class_attention(query: Float[Array, "B S N H"], key: Float[Array, "B S N H"]) -> Float[Array, "B S"]:
  """Attention probabilities of the first token, averaged over heads."""
  logits = jnp.einsum("BNH,BSNH->BNS", query[:, 0], key, preferred_element_type=jnp.float32)
  return jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1).mean(axis=1)


class VisionTower(nn.Module):
  """Pixels to the features that the projector reads.

  Attributes:
    config: the tower.
    feature_layers: indices into the hidden states (0 is the embedding); their features are concatenated.
    select_strategy: `default` drops the first token, `full` keeps every token.
    attend: how attention is computed.
  """

  config: VisionConfig
  feature_layers: tuple[int, ...]
  select_strategy: str
  attend: Attend

  @nn.compact
  def __call__(self, pixel_values: Float[Array, "B 3 h w"]) -> TowerOutput:
    embeddings = DinoEmbeddings if self.config.model_type == "dinov2" else ClipEmbeddings
    x = embeddings(self.config, name="embeddings")(pixel_values)
    if self.config.model_type == "clip_vision_model":
      x = LayerNorm(self.config.layer_norm_eps, name="pre_layrnorm")(x)
    hidden_states, (query, key) = Encoder(self.config, max(self.feature_layers), self.attend, name="encoder")(x)
    features = jnp.concatenate([hidden_states[layer] for layer in self.feature_layers], axis=-1)
    attention = class_attention(query, key) if self.config.has_class_token else None
    output = TowerOutput(features, attention, key)
    return jax.tree.map(lambda y: y[:, 1:], output) if self.select_strategy == "default" else output
