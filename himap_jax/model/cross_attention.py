"""A decoder whose text reads image tokens by cross-attention (Llama-3.2-Vision; transformers' `MllamaTextModel`).

The image tokens of a row keep slots of the sequence, after the text token `<|image|>` that stands for their picture, so
that prompts, layouts and pruning are those of any model. But no layer changes them: self-attention runs on the text
alone, and the cross layers take keys and values from the image slots, which hold the connector's outputs.

    slots         [ text | <|image|> | image …… image | text | padding ]
    self layers   [ text | <|image|>                  | text | padding ]   causal
    cross layers  [ text | <|image|>                  | text | padding ]   reads   [ image …… image ]

A text token reads the pictures of the last group before it: of those whose `<|image|>` follow each other directly. Of a
picture it reads no tiles of padding. One that reads nothing, because it stands before all pictures or because all of
theirs were pruned, attends to all image tokens of the row, those of padding too, and the feed-forward adds nothing to
it: so does the reference. Rows without pictures skip the cross layers.

Axes: B batch, S slots, T text slots, M image tokens, Q queries, R slots in which a projection is wanted, N query heads,
K key heads, H head dim, D model dim.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from himap_jax.inputs import IMAGE, Layout, put_slots, pytree, take_slots
from himap_jax.model import cache, rope
from himap_jax.model.cache import ImageMask, NewTokens, SegmentCache
from himap_jax.model.decoder import Decoder, DecoderModule, FeedForward, Projections, decoder_norm
from himap_jax.model.linear import Linear
from himap_jax.model.tracing import traced_once

NO_GROUP = -1


@pytree
class CrossLayout(Layout):
  """A layout whose image tokens are read by text alone; their `order` is that of their `<|image|>`.

  Attributes:
    group: `[B, S]` groups of pictures that begin at or before the slot; `NO_GROUP` for tokens of tiles of padding.
  """

  group: Int[Array, "B S"] = flax.struct.field(default=None)

  @classmethod
  def of(cls, layout: Layout, is_padding: Bool[Array, "B M"]) -> "CrossLayout":
    """The layout of unpruned rows in which the slot before a picture holds its `<|image|>`.

    `is_padding` tells which image tokens are of tiles of padding.
    """
    is_image = layout.kind == IMAGE
    before, after = (
      jnp.pad(part, ((0, 0), pad)) for part, pad in ((is_image[:, :-1], (1, 0)), (is_image[:, 1:], (0, 1)))
    )
    stands_for_picture = after & ~is_image
    group = jnp.cumsum(stands_for_picture & ~before, axis=1, dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(stands_for_picture, layout.order, -1), axis=1)
    unread = is_image & take_slots(is_padding, jnp.maximum(layout.image_token, 0))
    order, group = jnp.where(is_image, start, layout.order), jnp.where(unread, NO_GROUP, group)
    return cls(**vars(layout) | {"order": order}, group=group)

  def visible(self, slots: Int[Array, "B Q"]) -> Bool[Array, "B Q S"]:
    """Image tokens that the text in `slots` attends to."""
    own = self._read(slots)
    return jnp.where(own.any(axis=2, keepdims=True), own, (self.kind == IMAGE)[:, None])

  def image_mask(self, slots: Int[Array, "B Q"]) -> ImageMask:
    """`visible` for the image tokens alone."""
    own = take_slots(jnp.swapaxes(self.visible(slots), 1, 2), self.image_slots())
    return ImageMask(jnp.swapaxes(own, 1, 2)[:, None], self._read(slots).any(axis=2, keepdims=True))

  def _read(self, slots: Int[Array, "B Q"]) -> Bool[Array, "B Q S"]:
    order, group = (take_slots(x, slots)[:, :, None] for x in (self.order, self.group))
    return (self.kind == IMAGE)[:, None] & (self.group[:, None] == group) & (self.order[:, None] <= order)


@pytree
class CrossProjections(Projections):
  """Queries of the text, and keys and values of the image tokens in a cross layer."""


class CrossAttention(DecoderModule):
  """Projections of a cross layer; nothing is rotated."""

  def setup(self) -> None:
    c, linear = self.config, functools.partial(Linear, kernels=self.kernels)
    self.q_proj = linear(c.num_attention_heads * c.head_dim, axes=("heads", None))
    self.k_proj = linear(c.num_key_value_heads * c.head_dim, axes=("key_heads", None))
    self.v_proj = linear(c.num_key_value_heads * c.head_dim, axes=("key_heads", None))
    self.o_proj = linear(c.hidden_size, axes=(None, "heads"))
    self.q_norm, self.k_norm = decoder_norm(c), decoder_norm(c)

  def query(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q N H"]:
    return self.q_norm(self._heads(self.q_proj(x)))

  def key(self, states: Float[Array, "B M D"]) -> Float[Array, "B M K H"]:
    return self.k_norm(self._heads(self.k_proj(states)))

  def value(self, states: Float[Array, "B M D"]) -> Float[Array, "B M K H"]:
    return self._heads(self.v_proj(states))

  def output(self, context: Float[Array, "B Q N H"]) -> Float[Array, "B Q D"]:
    return self.o_proj(context.reshape(*context.shape[:2], -1))

  def _heads(self, x: Float[Array, "B Q F"]) -> Float[Array, "B Q N H"]:
    dim = self.config.head_dim
    return x.reshape(*x.shape[:2], x.shape[2] // dim, dim)


class CrossLayer(DecoderModule):
  """A layer in which the text reads image tokens; gates weigh what it adds."""

  def setup(self) -> None:
    self.input_layernorm = decoder_norm(self.config)
    self.cross_attn = CrossAttention(self.config, self.kernels)
    self.cross_attn_attn_gate = self.param("cross_attn_attn_gate", nn.initializers.zeros, (1,))
    self.post_attention_layernorm = decoder_norm(self.config)
    self.mlp = FeedForward(self.config, self.kernels)
    self.cross_attn_mlp_gate = self.param("cross_attn_mlp_gate", nn.initializers.zeros, (1,))

  def __call__(
    self, x: Float[Array, "B T D"], states: Float[Array, "B M D"], mask: ImageMask
  ) -> tuple[Float[Array, "B T D"], CrossProjections]:
    query = self.cross_attn.query(self.input_layernorm(x))
    own = CrossProjections(query, self.cross_attn.key(states), self.cross_attn.value(states))
    if not states.shape[1]:
      return x, own
    return self._finish(x, self.kernels.attention(own.query, own.key, own.value, mask.visible), mask.reads), own

  def project(
    self, x: Float[Array, "B S D"], slots: Int[Array, "B R"]
  ) -> tuple[Float[Array, "B R N H"], Float[Array, "B S K H"]]:
    """Queries of the text in `slots`, and keys of all slots; those of text are meaningless."""
    return self.cross_attn.query(self.input_layernorm(take_slots(x, slots))), self.cross_attn.key(x)

  def extend(
    self,
    x: Float[Array, "B 1 D"],
    prompt: tuple[Float[Array, "B K M H"], Float[Array, "B K H M"]],
    new: tuple[Float[Array, "B K m H"], Float[Array, "B K m H"]],
    mask: ImageMask,
  ) -> Float[Array, "B 1 D"]:
    """Runs the layer on one new token per row; `prompt` are keys and values of image tokens, `new` is never read."""
    if not prompt[0].shape[2]:
      return x
    query = self.cross_attn.query(self.input_layernorm(x))
    unread = jnp.zeros((x.shape[0], 1, 1, new[0].shape[2]), bool)
    context = self.kernels.cache_attention(query, (*prompt, mask.visible), (*new, unread))
    return self._finish(x, context, mask.reads)

  def _finish(
    self, x: Float[Array, "B Q D"], context: Float[Array, "B Q N H"], reads: Bool[Array, "B Q 1"]
  ) -> Float[Array, "B Q D"]:
    x = x + self.cross_attn.output(context) * _weight(self.cross_attn_attn_gate, x)
    y = jnp.where(reads, self.mlp(self.post_attention_layernorm(x)), 0)
    return x + y * _weight(self.cross_attn_mlp_gate, x)


class CrossDecoder(Decoder):
  """The language model without its head."""

  def make_layers(self) -> list[nn.Module]:
    own, cross = super().make_layers(), traced_once(CrossLayer, "__call__", "project", "extend")
    for index in self.config.cross_attention_layers:
      own[index] = cross(self.config, self.kernels)
    return own

  def layout(self, layout: Layout, is_padding: Bool[Array, "B P"]) -> Layout:
    if not layout.num_image_tokens:
      return CrossLayout(**vars(layout), group=layout.image_id)
    return CrossLayout.of(layout, jnp.repeat(is_padding, layout.num_image_tokens // is_padding.shape[1], axis=1))

  def __call__(
    self,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S"],
    layers: range,
    *,
    layout: CrossLayout,
    mask: Bool[Array, "B 1 S S"] | None = None,
    partial_layers: frozenset[int] = frozenset(),
    injections: tuple[()] = (),
  ) -> tuple[Float[Array, "B S D"], list[Projections]]:
    """As `Decoder`; `mask` applies to text alone, and no layer is partial or has injections: image tokens never change.

    Attention is not calibrated.
    """
    if partial_layers or injections:
      raise ValueError("no layer of this decoder changes image tokens")
    if layout.calibration is not None:
      raise ValueError("this decoder's attention to image tokens is not calibrated")
    text = layout.text_slots()
    states, image_states = take_slots(x, text), take_slots(x, layout.image_slots())
    rotation = rope.rotation(self.config.rope, self.config.rotary_dim, take_slots(positions, text))
    reads = layout.image_mask(text)
    if mask is not None:
      mask = jax.vmap(lambda own, at: own[:, at[:, None], at[None]])(mask, text)
    projections = []
    for index in layers:
      with jax.named_scope(f"layer_{index}"):
        arguments = (image_states, reads) if index in self.config.cross_attention_layers else (rotation, mask)
        states, layer_projections = self.layers[index](states, *arguments)
      projections.append(layer_projections)
    return put_slots(x, text, states), projections

  def project(
    self, x: Float[Array, "B S D"], positions: Int[Array, "B S"], layer: int, slots: Int[Array, "B R"]
  ) -> Projections:
    """As `Decoder`, for a cross layer; without values."""
    del positions
    query, key = self.layers[layer].project(x, slots)
    return Projections(query, key, jnp.zeros_like(key))

  def scored(self, projections: list[Projections], layout: Layout) -> Projections | None:
    """Those of the last cross layer, by slot: queries of text and keys of image tokens, and zeros elsewhere."""
    last = next((layer for layer in reversed(projections) if isinstance(layer, CrossProjections)), None)
    if last is None:
      return None

    def by_slot(part: Float[Array, "B Q N H"], slots: Int[Array, "B Q"]) -> Float[Array, "B S N H"]:
      return put_slots(jnp.zeros((part.shape[0], layout.num_slots, *part.shape[2:]), part.dtype), slots, part)

    image = layout.image_slots()
    return Projections(by_slot(last.query, layout.text_slots()), by_slot(last.key, image), by_slot(last.value, image))

  def cache(self, projections: list[Projections], layout: CrossLayout) -> SegmentCache:
    own = super().cache(projections, layout)
    order = take_slots(layout.order, layout.text_slots())
    return own.replace(order=order, images=layout.image_mask(layout.last_slot()[:, None]))

  def extend(
    self,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
    order: Int[Array, "B"],
    caches: tuple[SegmentCache, ...],
    new: NewTokens,
    dtype: Any,
  ) -> tuple[Float[Array, "B 1 D"], NewTokens]:
    """As `Decoder`; new tokens read the image tokens that the prompt's last token reads."""
    x = self.embed(tokens, dtype)
    rotation = rope.rotation(self.config.rope, self.config.rotary_dim, positions)
    new, slot = new.append_order(order)
    new_mask = cache.visible(new.order, order, None)
    keys, values = [], []
    for segment in caches:
      mask = cache.visible(segment.order, order, None)
      for prompt in zip(segment.keys, segment.values, strict=True):
        index = len(keys)
        own = new.keys[index], new.values[index]
        if index in self.config.cross_attention_layers:
          x = self.layers[index].extend(x, prompt, own, segment.images)
        else:
          x, *own = self.layers[index].extend(x, rotation, (*prompt, mask), (*own, new_mask), slot)
        keys.append(own[0])
        values.append(own[1])
    return x, new.replace(keys=tuple(keys), values=tuple(values))


def _weight(gate: Float[Array, "1"], x: Float[Array, "..."]) -> Float[Array, ""]:
  return jnp.tanh(gate.astype(x.dtype)[0])
