"""A vision-language model: tower → connector → merge with the text → decoder.

Axes: B batch, S slots, A axes of positions (none for one), N image tokens of a row, D model dim, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from himap_jax.inputs import Images, Inputs, Layout, put_image_tokens, pytree, take_slots
from himap_jax.model.config import ModelConfig
from himap_jax.model.connectors import CONNECTORS
from himap_jax.model.cross_attention import CrossDecoder
from himap_jax.model.decoder import Decoder
from himap_jax.model.kernels import Kernels, xla
from himap_jax.model.linear import INIT_NORMAL, Embedding, cast
from himap_jax.model.towers import abstract_images, vision_tower
from himap_jax.model.towers.common import TowerOutput


def pack(
  outputs: Shaped[Array, "B F *D"], images: Images, newline: Float[Array, "*D"] | None
) -> Shaped[Array, "B N *D"]:
  """What belongs to each image token, from what belongs to each output of the connector: see `Images`.

  Without `newline`, newlines are zeros.
  """
  if images.pack_index is None:
    return outputs
  batch, num_tokens, taps = images.pack_index.shape
  newline = jnp.zeros(outputs.shape[2:], outputs.dtype) if newline is None else newline.astype(outputs.dtype)
  newlines = jnp.broadcast_to(newline, (batch, 1, *outputs.shape[2:]))
  index = jnp.where(images.pack_index < 0, outputs.shape[1], images.pack_index).reshape(batch, -1)
  taken = take_slots(jnp.concatenate([outputs, newlines], axis=1), index)
  taken = taken.reshape(batch, num_tokens, taps, *outputs.shape[2:])
  if images.pack_weight is None:
    return taken.sum(axis=2)
  return jnp.einsum("BNt...,BNt->BN...", taken, images.pack_weight.astype(taken.dtype))


class Embedded(NamedTuple):
  """Prompts before the decoder.

  Attributes:
    x: hidden states.
    tower: output of the vision tower, by image token; None without pictures.
    injections: what is added to the image tokens after the first layers of the decoder.
  """

  x: Float[Array, "B S D"]
  positions: Int[Array, "B S *A"]
  layout: Layout
  tower: TowerOutput | None
  injections: tuple[Float[Array, "B N D"], ...] = ()


class EncodedImages(NamedTuple):
  """Pictures behind the tower and the connector, which `Inputs.images` may hold in place of their pixels.

  Attributes:
    tokens: image tokens in the decoder's width.
    tower: output of the vision tower, by image token.
    is_padding: as in `Images`.
  """

  tokens: Float[Array, "B N D"]
  tower: TowerOutput
  is_padding: Bool[Array, "B P"]


class Network(nn.Module):
  """The computation, in `dtype`; softmax, norms, products and logits accumulate in float32."""

  config: ModelConfig
  dtype: Any = jnp.bfloat16
  kernels: Kernels = xla.KERNELS

  def setup(self) -> None:
    config, text = self.config, self.config.text
    self.vision_tower = vision_tower(config.vision, self.kernels)
    connector = CONNECTORS[type(config.connector)]
    self.multi_modal_projector = connector(config.connector, text.hidden_size, self.kernels)
    self.deepstack_mergers = [  # which normalise the features of a square together
      connector(dataclasses.replace(config.connector, num_parts=1), text.hidden_size, self.kernels)
      for _ in config.vision.deepstack_layers
    ]
    self.language_model = (CrossDecoder if text.cross_attention_layers else Decoder)(text, self.kernels)
    if config.has_newline:
      self.image_newline = self.param("image_newline", INIT_NORMAL, (text.hidden_size,))
    if not text.tie_word_embeddings:
      self.lm_head = Embedding(text.vocab_size, text.hidden_size, self.kernels, axes=("vocabulary", None))

  def encode_images(self, images: Images | EncodedImages) -> EncodedImages:
    """Encodes the pictures of each row together, unless they are encoded."""
    if isinstance(images, EncodedImages):
      return images
    batch = images.pixels.shape[0]
    with jax.named_scope("vision_tower"):
      tower = self.vision_tower(images.replace(pixels=images.pixels.astype(self.dtype)))
      if self.config.has_grid:
        tower = tower.replace(grid=self._grid(images, tower.features.shape[1]))
    with jax.named_scope("connector"):
      outputs = self.multi_modal_projector(tower.features), tower
      image_tokens, tower = jax.tree.map(
        lambda x: x.reshape(batch, x.shape[0] // batch * x.shape[1], *x.shape[2:]), outputs
      )
      newline = self.image_newline if self.config.has_newline else None
      tower = jax.tree.map(lambda x: pack(x, images, None), tower)
      if newline is not None and images.pack_index is not None:
        tower = tower.replace(is_newline=images.pack_index[..., 0] < 0)
      return EncodedImages(pack(image_tokens, images, newline), tower, images.is_padding)

  def _grid(self, images: Images, num_features: int) -> Int[Array, "b Q 3"]:
    """Tile of the row, row and column of each of the features of every tile."""
    vision, (batch, num_tiles, _, _, width) = self.config.vision, images.pixels.shape
    columns = width // vision.patch_size // (vision.merge_size * vision.pool)
    tile, feature = np.indices((num_tiles, num_features), np.int32)
    places = np.stack([tile, *np.divmod(feature, columns)], axis=2)
    return jnp.tile(places, (batch, 1, 1))

  def embed(self, inputs: Inputs) -> Embedded:
    """Embeds tokens and images, with the image tokens in their slots."""
    layout = inputs.layout.replace(is_bidirectional=self.config.text.is_bidirectional)
    x = self.language_model.embed(inputs.tokens, self.dtype)
    layout = self.language_model.layout(layout, inputs.images.is_padding)
    if not layout.num_image_tokens:
      return Embedded(x, inputs.positions, layout, None)
    encoded = self.encode_images(inputs.images)
    x = put_image_tokens(x, encoded.tokens, layout)
    pairs = zip(self.deepstack_mergers, encoded.tower.deepstack, strict=True)
    injections = tuple(merger(features) for merger, features in pairs)
    return Embedded(x, inputs.positions, layout, encoded.tower, injections)

  def logits(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Final norm and head, in float32."""
    head = self.language_model.embed_tokens if self.config.text.tie_word_embeddings else self.lm_head
    x = self.language_model.norm(x)
    return self.kernels.product(x, cast(head.weight, x.dtype))

  def __call__(self, inputs: Inputs) -> Float[Array, "B S V"]:
    """Logits of every slot, without pruning; undefined in padding."""
    embedded = self.embed(inputs)
    layers = range(self.config.text.num_hidden_layers)
    x, _ = self.language_model(
      embedded.x, embedded.positions, layers, layout=embedded.layout, injections=embedded.injections
    )
    return self.logits(x)


@pytree
class Model:
  """A network with its parameters, named as in the checkpoint; passed as one argument to every compiled program."""

  params: PyTree
  network: Network = flax.struct.field(pytree_node=False)

  @property
  def config(self) -> ModelConfig:
    return self.network.config

  @property
  def dtype(self) -> Any:
    """Dtype of activations and of all parameters that are not quantised."""
    return self.network.dtype

  def bind(self, length: int | None = None) -> Network:
    """The network with its parameters bound, for use inside a program.

    Args:
      length: of the longest row, if known: sliding windows that hide nothing of it then cost nothing.
    """
    network = self.network
    if length is not None:
      text = self.config.text.within(length)
      network = network.clone(config=dataclasses.replace(self.config, text=text))
    return network.bind({"params": self.params})


def abstract_params(config: ModelConfig, dtype: Any) -> dict[str, Any]:
  """The parameter tree as `jax.ShapeDtypeStruct`s; nothing is computed."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.unbox(_abstract_variables(config))["params"])


def logical_axes(config: ModelConfig) -> dict[str, Any]:
  """The parameter tree as `PartitionSpec`s of logical axes."""
  return nn.get_partition_spec(_abstract_variables(config))["params"]


@functools.lru_cache
def _abstract_variables(config: ModelConfig) -> dict[str, Any]:
  side = config.vision.image_size // config.vision.patch_size * config.vision.patch_size
  num_image_tokens = config.num_image_tokens(side, side)
  image_id = np.zeros((1, num_image_tokens + 1), np.int32)
  image_id[0, -1] = -1
  layout = Layout.of_rows((image_id >= 0).astype(np.int32), image_id, num_image_tokens)
  images = jax.tree.map(lambda x: x.update(shape=(1, *x.shape)), abstract_images(config.vision, side, side))
  inputs = Inputs(image_id, layout, image_id, images)
  return jax.eval_shape(lambda inputs: Network(config).init(jax.random.key(0), inputs), inputs)
