"""What HiMAP's stages would score by.

Axes: L layers, B batch, N image tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.llava import Inputs, Llava
from himap_jax.methods.himap import image_attention, instruction_attention
from himap_jax.prefill import run_segments, start, view
from himap_jax.schedule import Segment


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def first_stage(model: Llava, params: Any, inputs: Inputs, *, layer: int) -> Float[Array, "B N"]:
  """The scores of HiMAP's first stage before a layer."""
  bound = model.bind({"params": params})
  embedded = bound.embed(inputs)
  keys = jax.random.split(jax.random.key(0), inputs.tokens.shape[0])
  segment = Segment(0, layer, embedded[1].num_image_tokens, None)
  sequence, _, _, projections = run_segments(bound, start(embedded), (segment,), embedded, keys)
  return instruction_attention(view(bound, layer, sequence, projections, embedded, keys))


@functools.partial(jax.jit, static_argnames="model")
def all_layers(model: Llava, params: Any, inputs: Inputs) -> tuple[Float[Array, "L B N"], Float[Array, "L B N"]]:
  """What HiMAP's stages would score by after each layer, the first and the second, without pruning."""
  bound = model.bind({"params": params})
  sequence, keys = start(bound.embed(inputs)), jax.random.split(jax.random.key(0), inputs.tokens.shape[0])
  received = []
  for layer in range(model.config.text.num_hidden_layers):
    x, (projections,) = bound.language_model(sequence.x, sequence.positions, first=layer, last=layer + 1)
    sequence = sequence._replace(x=x)
    seen = view(bound, layer + 1, sequence, projections, None, keys)
    received.append((instruction_attention(seen), image_attention(seen)))
  return tuple(map(jnp.stack, zip(*received, strict=True)))
