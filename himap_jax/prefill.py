"""Prefill with pruning between segments: score → top-k → sort → gather, and the cache of what was kept.

Axes: B batch, S slots, M kept image tokens, D model dim, V vocabulary.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from himap_jax import cache
from himap_jax.layout import Layout
from himap_jax.llava import Inputs, Llava
from himap_jax.schedule import Schedule


@flax.struct.dataclass
class Prefill:
  """The result of a prefill.

  Attributes:
    logits: `[B, V]` float32, after each row's last token.
    caches: one cache a segment.
    kept: for each stage `[B, M]` the image tokens kept, as indices 0 … N − 1 into the picture's tokens, ascending.
  """

  logits: Float[Array, "B V"]
  caches: tuple[cache.SegmentCache, ...]
  kept: tuple[Int[Array, "B M"], ...]


def prefill(model: Llava, params: Any, inputs: Inputs, schedule: Schedule, num_new_slots: int) -> Prefill:
  """Runs the prompts through the model, pruning as the schedule says.

  Args:
    model: the model.
    params: its parameters.
    inputs: the batch.
    schedule: stages; static.
    num_new_slots: room for decoded tokens in the caches; static.
  """
  bound = model.bind({"params": params})
  x, layout = bound.embed(inputs)
  slot = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  positions = jnp.where(slot < layout.length[:, None], slot, cache.UNUSED_POSITION)
  original = jnp.broadcast_to(
    jnp.arange(layout.num_image_tokens, dtype=jnp.int32)[None], (x.shape[0], layout.num_image_tokens)
  )
  caches, kept = [], []
  for segment in schedule.segments(model.config.text.num_hidden_layers, layout.num_image_tokens):
    x, projections = bound.language_model(x, positions, first=segment.first, last=segment.last)
    caches.append(
      cache.from_prefill(
        tuple(p.key for p in projections), tuple(p.value for p in projections), positions, num_new_slots
      )
    )
    if segment.stage is not None:
      with jax.named_scope(f"prune_before_layer_{segment.last}"):
        chosen = select(segment.stage.score(projections[-1], layout), segment.stage.keep)
        x, positions, layout = gather(x, positions, layout, chosen)
        original = jnp.take_along_axis(original, chosen, axis=1)
      kept.append(original)
  last = jnp.take_along_axis(x, (layout.length - 1)[:, None, None], axis=1)
  return Prefill(logits=bound.logits(last)[:, 0], caches=tuple(caches), kept=tuple(kept))


def select(scores: Float[Array, "B N"], keep: int) -> Int[Array, "B M"]:
  """Indices of the `keep` highest scores, ascending; of equal scores the earlier wins."""
  return jnp.sort(jax.lax.top_k(scores, keep)[1], axis=1)


def gather(
  x: Float[Array, "B S D"], positions: Int[Array, "B S"], layout: Layout, chosen: Int[Array, "B M"]
) -> tuple[Float[Array, "B R D"], Int[Array, "B R"], Layout]:
  """Removes the image tokens that were not chosen from hidden states and positions; the rest keep theirs."""
  source, layout = layout.keep(chosen, x.shape[1])
  x = jnp.take_along_axis(x, source[:, :, None], axis=1)
  return x, jnp.take_along_axis(positions, source, axis=1), layout
