"""CDPruner: tokens relevant to the instruction and different from each other, by a determinantal point process.

The authors take the relevance from the tower's text encoder. A LLaVA checkpoint has none, so here it is the similarity
of image and instruction tokens at the decoder's input. They scale relevance over the batch; here it is scaled per row,
so that rows are independent.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from himap_jax.inputs import take_slots
from himap_jax.pruning.method import SEQUENCE, Method, View, cosine_similarity, mark, ranking
from himap_jax.pruning.sizes import Sizes

EPSILON = 1e-6


def relevance(view: View) -> Float[Array, "B M"]:
  """Mean cosine similarity to the instruction tokens, scaled to (0, 1]."""
  slots, valid = view.layout.instruction_slots()
  similarity = cosine_similarity(view.image_tokens(), take_slots(view.x, slots))
  count = jnp.maximum(valid.sum(axis=1, dtype=jnp.float32), 1.0)[:, None]
  mean = jnp.where(valid[:, None], similarity, 0.0).sum(axis=2) / count
  present = view.layout.image_present()
  low = jnp.where(present, mean, jnp.inf).min(axis=1, keepdims=True)
  high = jnp.where(present, mean, -jnp.inf).max(axis=1, keepdims=True)
  return (mean - low + EPSILON) / jnp.maximum(high - low, EPSILON)


def determinantal(view: View, keep: int) -> Int[Array, "B K"]:
  """Greedy MAP inference for the process with kernel r_i · cos(v_i, v_j) · r_j (arXiv 1709.05135)."""
  tokens, weight, present = view.image_tokens(), relevance(view), view.layout.image_present()
  kernel = weight[:, :, None] * cosine_similarity(tokens, tokens) * weight[:, None]
  batch, num_tokens, _ = kernel.shape

  def choose(index, state):
    gain, chosen, columns, kept = state
    candidate = jnp.where(present, gain, jnp.finfo(jnp.float32).min)
    token = jnp.where(chosen, -jnp.inf, candidate).argmax(axis=1).astype(jnp.int32)
    explained = jnp.einsum("BK,BKM->BM", _take_token(columns, token, axis=2), columns, precision="highest")
    own = _take_token(gain, token, axis=1)
    # Zero up to rounding once the kernel's rank is exhausted; the column is then zero.
    scale = jnp.where(own > EPSILON**2, jax.lax.rsqrt(jnp.maximum(own, EPSILON**2)), 0.0)
    column = (_take_token(kernel, token, axis=1) - explained) * scale[:, None]
    gain = gain - jnp.square(column)
    chosen |= mark(token[:, None], num_tokens)
    return gain, chosen, columns.at[:, index].set(column), kept.at[:, index].set(token)

  start = (
    jnp.diagonal(kernel, axis1=1, axis2=2),
    jnp.zeros((batch, num_tokens), bool),
    jnp.zeros((batch, keep, num_tokens), jnp.float32),
    jnp.zeros((batch, keep), jnp.int32),
  )
  return jax.lax.fori_loop(0, keep, choose, start)[3]


def _take_token(x: Float[Array, "B ..."], token: Int[Array, "B"], axis: int) -> Float[Array, "B ..."]:
  """Each row's entries for its token."""
  indices = token.reshape(-1, *[1] * (x.ndim - 1))
  return jnp.take_along_axis(x, indices, axis=axis).squeeze(axis)


def cost(sizes: Sizes) -> int:
  """Similarities of image tokens to each other and to text, and a pass over the columns per kept token."""
  pairs = sizes.num_present * (sizes.num_present + sizes.num_text_tokens)
  return pairs * sizes.model.hidden_size + sizes.keep**2 * sizes.num_present


CRITERION = ranking(determinantal, cost)
METHODS = {
  "cdpruner": Method("arXiv 2506.10967, 64 tokens", (CRITERION,), (0,), (64 / 576,), acts="before", needs=SEQUENCE)
}
