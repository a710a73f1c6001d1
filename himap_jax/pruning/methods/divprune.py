"""DivPrune: tokens that are far from each other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from himap_jax.pruning.method import Method, View, cosine_similarity, mark, ranking
from himap_jax.pruning.sizes import Sizes


def max_min_distance(view: View, keep: int) -> Int[Array, "B K"]:
  """Greedy: starts with the token farthest from its nearest neighbour, then adds the one farthest from all chosen.

  The distance is one minus the cosine of projected image tokens.
  """
  tokens, present = view.image_tokens(), view.layout.image_present()
  distance = 1.0 - cosine_similarity(tokens, tokens)
  batch, num_tokens, _ = distance.shape
  others = ~jnp.eye(num_tokens, dtype=bool)[None] & present[:, None]
  nearest = jnp.where(others, distance, jnp.inf).min(axis=2)
  reach = jnp.where(present, jnp.inf, jnp.finfo(jnp.float32).min)

  def choose(index, state):
    score, reach, kept = state
    token = score.argmax(axis=1).astype(jnp.int32)
    from_token = jnp.take_along_axis(distance, token[:, None, None], axis=1)[:, 0]
    reach = jnp.where(mark(token[:, None], num_tokens), -jnp.inf, jnp.minimum(reach, from_token))
    return reach, reach, kept.at[:, index].set(token)

  start = jnp.minimum(nearest, reach), reach, jnp.zeros((batch, keep), jnp.int32)
  return jax.lax.fori_loop(0, keep, choose, start)[2]


def cost(sizes: Sizes) -> int:
  """Similarities of all pairs."""
  return sizes.num_present**2 * sizes.model.hidden_size


CRITERION = ranking(max_min_distance, cost)
METHODS = {"divprune": Method("arXiv 2503.02175, 9.8% of the tokens", (CRITERION,), (0,), (0.098,), acts="before")}
