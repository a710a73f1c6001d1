"""LLaVA: vision tower → projector → merge with the text → decoder.

Axes: B batch, S slots, N image tokens, D model dim, V vocabulary.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from himap_jax.attention import Attend, xla_attention
from himap_jax.config import LlavaConfig
from himap_jax.decoder import Decoder
from himap_jax.layout import Layout, put_image_tokens
from himap_jax.linear import ACTIVATIONS, Embedding, Linear, cast, product
from himap_jax.vision import TowerOutput, VisionTower


@flax.struct.dataclass
class Inputs:
  """A batch of prompts, each with one image.

  Attributes:
    tokens: `[B, S]` token ids, padded on the right; the image token's id in image slots.
    length: `[B]` slots that hold a token.
    image_start: `[B]` the first image slot.
    pixel_values: `[B, 3, height, width]` preprocessed images.
  """

  tokens: Int[Array, "B S"]
  length: Int[Array, "B"]
  image_start: Int[Array, "B"]
  pixel_values: Float[Array, "B 3 h w"]


class Projector(nn.Module):
  """Two linear layers from tower features to the decoder's width."""

  config: LlavaConfig

  @nn.compact
  def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
    width, use_bias = self.config.text.hidden_size, self.config.projector_bias
    x = Linear(width, use_bias=use_bias, name="linear_1")(features)
    return Linear(width, use_bias=use_bias, name="linear_2")(ACTIVATIONS[self.config.projector_hidden_act](x))


class Llava(nn.Module):
  """The model; it computes in `dtype`, softmax, norms, products and logits accumulating in float32.

  Attributes:
    config: the model's sizes.
    dtype: of hidden states and of the weights in products.
    attend: how attention is computed; see `attention.for_mesh`.
  """

  config: LlavaConfig
  dtype: Any = jnp.bfloat16
  attend: Attend = xla_attention

  def setup(self) -> None:
    config = self.config
    self.vision_tower = VisionTower(
      config.vision, config.vision_feature_layers, config.vision_feature_select_strategy, self.attend
    )
    self.multi_modal_projector = Projector(config)
    self.language_model = Decoder(config.text, self.attend)
    if not config.text.tie_word_embeddings:
      self.lm_head = Embedding(config.text.vocab_size, config.text.hidden_size, axes=("vocabulary", None))

  def encode_images(self, pixel_values: Float[Array, "B 3 h w"]) -> tuple[Float[Array, "B N D"], TowerOutput]:
    """Image tokens in the decoder's width, and what the tower says of them."""
    with jax.named_scope("vision_tower"):
      tower = self.vision_tower(pixel_values.astype(self.dtype))
    with jax.named_scope("projector"):
      return self.multi_modal_projector(tower.features), tower

  def merge(
    self, tokens: Int[Array, "B S"], image_start: Int[Array, "B"], image_tokens: Float[Array, "B N D"]
  ) -> Float[Array, "B S D"]:
    """Embeds the tokens and puts the image tokens into their slots."""
    return put_image_tokens(self.language_model.embed_tokens(tokens).astype(self.dtype), image_start, image_tokens)

  def embed(self, inputs: Inputs) -> tuple[Float[Array, "B S D"], Layout, TowerOutput]:
    """Embeds a batch: hidden states of every slot, where the images stand, and what the tower says of them."""
    image_tokens, tower = self.encode_images(inputs.pixel_values)
    layout = Layout(inputs.length, inputs.image_start, image_tokens.shape[1])
    return self.merge(inputs.tokens, inputs.image_start, image_tokens), layout, tower

  def logits(self, x: Float[Array, "B S D"]) -> Float[Array, "B S V"]:
    """Final norm and head, in float32."""
    tied = self.config.text.tie_word_embeddings
    weight = (self.language_model.embed_tokens if tied else self.lm_head).weight
    x = self.language_model.norm(x)
    return product(x, cast(weight, x.dtype))

  def __call__(self, inputs: Inputs) -> Float[Array, "B S V"]:
    """Logits of every slot, without pruning; those of padding are meaningless."""
    x, _, _ = self.embed(inputs)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
    x, _ = self.language_model(x, positions, first=0, last=self.config.text.num_hidden_layers)
    return self.logits(x)


def abstract_params(config: LlavaConfig, dtype: Any) -> dict[str, Any]:
  """The parameter tree as `jax.ShapeDtypeStruct`s of the given dtype; nothing is computed."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nn.unbox(_abstract_variables(config))["params"])


def logical_axes(config: LlavaConfig) -> dict[str, Any]:
  """The parameter tree as a `PartitionSpec` of logical axes for every parameter."""
  return nn.get_partition_spec(_abstract_variables(config))["params"]


@functools.lru_cache
def _abstract_variables(config: LlavaConfig) -> dict[str, Any]:
  side = config.vision.image_size // config.vision.patch_size * config.vision.patch_size
  num_slots = config.num_image_tokens(side, side) + 1
  inputs = Inputs(
    tokens=jax.ShapeDtypeStruct((1, num_slots), jnp.int32),
    length=jax.ShapeDtypeStruct((1,), jnp.int32),
    image_start=jax.ShapeDtypeStruct((1,), jnp.int32),
    pixel_values=jax.ShapeDtypeStruct((1, 3, side, side), jnp.float32),
  )
  return jax.eval_shape(lambda inputs: Llava(config).init(jax.random.key(0), inputs), inputs)
