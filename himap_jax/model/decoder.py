"""A decoder of the LLaMA line: runs ranges of layers over a sequence, or all layers on one new token over a cache.

Axes: B batch, S query slots, A axes of positions (none for one), T cache slots, M slots of new tokens, N query heads, K
key heads, H head dim, F rotated features of a head, D model dim, R updated slots, I image tokens before pruning.

It knows no methods and no schedules; for RESTORE it calibrates the attention to image tokens that are left.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from himap_jax.inputs import IMAGE, Layout, put_slots, pytree, take_slots
from himap_jax.model import cache, calibration, rope
from himap_jax.model.cache import NewTokens, SegmentCache, write_slot
from himap_jax.model.config import RopeConfig, TextConfig
from himap_jax.model.kernels import HIDDEN, Kernels
from himap_jax.model.kernels.masks import Mask, where_seen
from himap_jax.model.linear import ACTIVATIONS, Embedding, Linear, RMSNorm
from himap_jax.model.tracing import traced_once

Rotation = tuple[Float[Array, "B S 1 F"], Float[Array, "B S 1 F"]]


@pytree
class Projections:
  """Rotated queries, rotated keys and values of one layer; partial layers have queries of the updated slots only."""

  query: Float[Array, "B S N H"]
  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K H"]


class DecoderModule(nn.Module):
  """A part of the decoder."""

  config: TextConfig
  kernels: Kernels


def decoder_norm(config: TextConfig) -> RMSNorm:
  """Any norm of the decoder."""
  return RMSNorm(config.rms_norm_eps, config.norm_offset)


class Attention(DecoderModule):
  """Query, key, value and output projections of one layer."""

  def setup(self) -> None:
    c, linear = self.config, functools.partial(Linear, kernels=self.kernels)
    self.q_proj = linear(c.num_attention_heads * c.head_dim, use_bias=c.qkv_bias, axes=("heads", None))
    self.k_proj = linear(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias, axes=("key_heads", None))
    self.v_proj = linear(c.num_key_value_heads * c.head_dim, use_bias=c.qkv_bias, axes=("key_heads", None))
    self.o_proj = linear(c.hidden_size, use_bias=c.output_bias, axes=(None, "heads"))
    if c.qk_norm:
      self.q_norm, self.k_norm = decoder_norm(c), decoder_norm(c)

  def query(self, x: Float[Array, "B S D"], rotation: Rotation) -> Float[Array, "B S N H"]:
    query, scale = self._heads(self.q_proj(x)), self.config.query_scale
    query = rope.rotate(self.q_norm(query) if self.config.qk_norm else query, *rotation)
    return query if scale == 1 else (query.astype(jnp.float32) * scale).astype(query.dtype)

  def key_value(
    self, x: Float[Array, "B S D"], rotation: Rotation
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Rotated keys, and values."""
    key = self._heads(self.k_proj(x))
    return rope.rotate(self.k_norm(key) if self.config.qk_norm else key, *rotation), self._heads(self.v_proj(x))

  def project(self, x: Float[Array, "B S D"], rotation: Rotation) -> Projections:
    key, value = self.key_value(x, rotation)
    return Projections(query=self.query(x, rotation), key=key, value=value)

  def _heads(self, x: Float[Array, "B S F"]) -> Float[Array, "B S N H"]:
    return x.reshape(*x.shape[:2], -1, self.config.head_dim)

  def output(self, context: Float[Array, "B S N H"]) -> Float[Array, "B S D"]:
    return self.o_proj(context.reshape(*context.shape[:2], -1))


class FeedForward(DecoderModule):
  """The gated feed-forward (GLU variants, arXiv 2002.05202)."""

  def setup(self) -> None:
    c, linear = self.config, functools.partial(Linear, kernels=self.kernels, use_bias=self.config.mlp_bias)
    self.gate_proj = linear(c.intermediate_size, axes=("feed_forward", None))
    self.up_proj = linear(c.intermediate_size, axes=("feed_forward", None))
    self.down_proj = linear(c.hidden_size, axes=(None, "feed_forward"))

  def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    return self.down_proj(ACTIVATIONS[self.config.hidden_act](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(DecoderModule):
  """One layer: over a whole sequence when called, over a cache in `extend`."""

  def setup(self) -> None:
    self.input_layernorm = decoder_norm(self.config)
    self.self_attn = Attention(self.config, self.kernels)
    self.post_attention_layernorm = decoder_norm(self.config)
    self.mlp = FeedForward(self.config, self.kernels)
    if self.config.output_norms:
      self.pre_feedforward_layernorm, self.post_feedforward_layernorm = (decoder_norm(self.config) for _ in range(2))

  def __call__(
    self, x: Float[Array, "B S D"], rotation: Rotation, mask: Mask | None
  ) -> tuple[Float[Array, "B S D"], Projections]:
    projections = self.self_attn.project(self.input_layernorm(x), rotation)
    is_causal = mask is None or not self.config.is_bidirectional
    context = self.kernels.attention(projections.query, projections.key, projections.value, mask, is_causal=is_causal)
    return self._finish(x, context), projections

  def project(self, x: Float[Array, "B S D"], rotation: Rotation, slots: Int[Array, "B R"]) -> Projections:
    """Keys and values of all slots, queries of `slots`."""
    x = self.input_layernorm(x)
    take = functools.partial(take_slots, slots=slots)
    key, value = self.self_attn.key_value(x, rotation)
    return Projections(query=self.self_attn.query(take(x), tuple(map(take, rotation))), key=key, value=value)

  def update(
    self, x: Float[Array, "B S D"], rotation: Rotation, slots: Int[Array, "B R"], mask: Bool[Array, "B 1 R S"]
  ) -> tuple[Float[Array, "B S D"], Projections]:
    """Updates some slots, which attend where `mask` is true; the others keep their hidden states."""
    projections = self.project(x, rotation, slots)
    context = self.kernels.attention(projections.query, projections.key, projections.value, mask)
    updated = self._finish(take_slots(x, slots), context)
    return put_slots(x, slots, updated), projections

  def extend(
    self,
    x: Float[Array, "B 1 D"],
    rotation: Rotation,
    prompt: tuple[Float[Array, "B K T H"], Float[Array, "B K H T"], Shaped[Array, "B 1 1 T"]],
    new: tuple[Float[Array, "B K M H"], Float[Array, "B K M H"], Shaped[Array, "B 1 1 M"]],
    slot: Int[Array, ""],
  ) -> tuple[Float[Array, "B 1 D"], Float[Array, "B K M H"], Float[Array, "B K M H"]]:
    """Runs the layer on one new token per row.

    Args:
      prompt: keys, values and mask of the prompt.
      new: keys, values and mask of the tokens after it.
      slot: the new token's slot in `new`.

    Returns:
      The hidden states, and the keys and values of `new` including the new token.
    """
    own = self.self_attn.project(self.input_layernorm(x), rotation)
    keys, values, mask = new
    keys, values = write_slot(keys, own.key, slot), write_slot(values, own.value, slot)
    return self._finish(x, self.kernels.cache_attention(own.query, prompt, (keys, values, mask))), keys, values

  def _finish(self, x: Float[Array, "B S D"], context: Float[Array, "B S N H"]) -> Float[Array, "B S D"]:
    y = self.self_attn.output(context)
    if self.config.output_norms:
      x = x + self.post_attention_layernorm(y)
      return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
    x = x + y
    return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(DecoderModule):
  """The language model without its head."""

  def setup(self) -> None:
    c = self.config
    rows = c.vocab_size + c.num_extra_embeddings
    self.embed_tokens = Embedding(rows, c.hidden_size, self.kernels, axes=("vocabulary", None))
    self.layers = self.make_layers()
    self.norm = decoder_norm(c)

  def make_layers(self) -> list[nn.Module]:
    """The layers, for `setup`."""
    layer = traced_once(DecoderLayer, "__call__", "project", "update", "extend")
    return [layer(self.config, self.kernels) for _ in range(self.config.num_hidden_layers)]

  def layout(self, layout: Layout, is_padding: Bool[Array, "B P"]) -> Layout:
    """The layout of unpruned rows as the decoder sees them; `is_padding` is that of their images."""
    del is_padding
    return layout

  def embed(self, tokens: Int[Array, "B S"], dtype: Any) -> Float[Array, "B S D"]:
    """Embeddings of text."""
    x, scale = self.embed_tokens(tokens).astype(dtype), self.config.embedding_scale
    return x if scale == 1 else x * jnp.asarray(scale, dtype)

  def __call__(
    self,
    x: Float[Array, "B S D"],
    positions: Int[Array, "B S *A"],
    layers: range,
    *,
    layout: Layout,
    mask: Bool[Array, "B 1 S S"] | None = None,
    partial_layers: frozenset[int] = frozenset(),
    injections: tuple[Float[Array, "B I D"], ...] = (),
  ) -> tuple[Float[Array, "B S D"], list[Projections]]:
    """Runs a range of layers, with calibrated attention if `layout` has a calibration.

    Args:
      mask: true where a query slot (row) may attend to a key slot, of those that it sees by the layout.
      partial_layers: layers that do not update image tokens, to which `mask` does not apply.
      injections: what is added to the image tokens after the first layers, one each (DeepStack, arXiv 2406.04334).

    Returns:
      The hidden states, and the projections of each layer.
    """
    rotation_of = self._rotations(positions)
    updated_slots = layout.text_slots() if partial_layers else None

    @functools.cache
    def mask_of(window: int | None) -> Bool[Array, "B 1 S S"] | None:
      if window is None and not layout.is_bidirectional:
        return mask  # the attention is causal
      seen = layout.replace(window=window).visible()[:, None]
      return seen if mask is None else seen & mask

    @functools.cache
    def calibrated_mask_of(window: int | None, config: RopeConfig, *, is_first: bool) -> Float[Array, "B 1 S S"]:
      rotation, head_dim = rotation_of(config), self.config.head_dim
      gain = calibration.gain(rotation, layout.calibration, head_dim, is_first=is_first)[:, None]
      seen = mask_of(window)
      return gain if seen is None else where_seen(seen, gain)

    @functools.cache
    def partial_mask_of(window: int | None) -> Bool[Array, "B 1 R S"]:
      return layout.replace(window=window).visible(updated_slots)[:, None]

    projections = []
    for index in layers:
      layer, window, rope_config = self.layers[index], self.config.window(index), self.config.rope_of(index)
      rotation = rotation_of(rope_config)
      with jax.named_scope(f"layer_{index}"):
        if index in partial_layers:
          x, layer_projections = layer.update(x, rotation, updated_slots, partial_mask_of(window))
        elif layout.calibration is None or not layout.num_image_tokens:
          x, layer_projections = layer(x, rotation, mask_of(window))
        else:
          is_first = index == layout.calibration.layer
          x, layer_projections = layer(x, rotation, calibrated_mask_of(window, rope_config, is_first=is_first))
        if index < len(injections):
          x = x + _at_image_slots(injections[index], layout)
      projections.append(layer_projections)
    return x, projections

  def project(
    self, x: Float[Array, "B S D"], positions: Int[Array, "B S *A"], layer: int, slots: Int[Array, "B R"]
  ) -> Projections:
    """Projections of `x` in a layer's attention: keys and values of all slots, queries of `slots`."""
    return self.layers[layer].project(x, self._rotations(positions)(self.config.rope_of(layer)), slots)

  def gain(
    self, positions: Int[Array, "B S *A"], layout: Layout, layer: int, slots: Int[Array, "B Q"]
  ) -> Float[Array, "B Q S"]:
    """What logits of queries in `slots` gain in a layer by the layout's calibration."""
    rotation, is_first = self._rotations(positions)(self.config.rope_of(layer)), layer == layout.calibration.layer
    return calibration.gain(rotation, layout.calibration, self.config.head_dim, slots, is_first=is_first)

  def _rotations(self, positions: Int[Array, "B S *A"]) -> Callable[[RopeConfig], Rotation]:
    """The rotation of every position by a rotary embedding, computed once for each."""
    return functools.cache(lambda config: rope.rotation(config, self.config.rotary_dim, positions))

  def scored(self, projections: list[Projections], layout: Layout) -> Projections | None:
    """Of those of a range of layers, the last in which image tokens are read; None if there are none."""
    del layout
    return projections[-1] if projections else None

  def cache(self, projections: list[Projections], layout: Layout) -> SegmentCache:
    """The cache of a range of layers."""
    keys, values = (tuple(getattr(own, name) for own in projections) for name in ("key", "value"))
    own = cache.from_prefill(keys, values, layout.order)
    return own if layout.calibration is None else own.replace(log_count=layout.calibration.log_count)

  def extend(
    self,
    tokens: Int[Array, "B 1"],
    positions: Int[Array, "B 1"],
    order: Int[Array, "B"],
    caches: tuple[SegmentCache, ...],
    new: NewTokens,
    dtype: Any,
  ) -> tuple[Float[Array, "B 1 D"], NewTokens]:
    """Runs all layers on one new token per row.

    Args:
      order: see `Layout.order`.
      caches: the prompts, one cache per segment, in layer order.
      new: the tokens after the prompts.
      dtype: of the hidden states.

    Returns:
      The hidden states before the final norm, and `new` including this token.
    """
    x = self.embed(tokens, dtype)
    rotation_of = self._rotations(positions)
    new, slot = new.append_order(order)
    windows = {self.config.window(index) for index in range(self.config.num_hidden_layers)}
    new_masks = {window: cache.visible(new.order, order, window) for window in windows}
    keys, values = [], []
    for segment in caches:
      masks = {window: cache.visible(segment.order, order, window) for window in windows}
      for number, prompt in enumerate(zip(segment.keys, segment.values, strict=True)):
        index = len(keys)
        window = self.config.window(index)
        mask, new_mask = masks[window], new_masks[window]
        if number == 0 and segment.log_count is not None:
          mask = where_seen(mask, segment.log_count[:, None, None])
          new_mask = jnp.where(new_mask, 0.0, HIDDEN)
        own = (new.keys[index], new.values[index], new_mask)
        rotation = rotation_of(self.config.rope_of(index))
        x, new_keys, new_values = self.layers[index].extend(x, rotation, (*prompt, mask), own, slot)
        keys.append(new_keys)
        values.append(new_values)
    return x, new.replace(keys=tuple(keys), values=tuple(values))


def _at_image_slots(injection: Float[Array, "B I D"], layout: Layout) -> Float[Array, "B S D"]:
  """Each remaining image token's injection in its slot, and zero elsewhere."""
  own = take_slots(injection, jnp.maximum(layout.image_token, 0))
  return jnp.where((layout.kind == IMAGE)[:, :, None], own, 0)
