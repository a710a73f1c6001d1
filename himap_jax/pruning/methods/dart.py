"""DART: tokens that are unlike a few pivots, hence unlike each other."""

import jax.numpy as jnp

from himap_jax.inputs import take_slots
from himap_jax.pruning.method import SEQUENCE, Criterion, Method, Selection, View, cosine_similarity, mark, stable_top_k
from himap_jax.pruning.sizes import Sizes

NUM_PIVOTS = 4  # image tokens, and as many text tokens


def unlike_pivots(view: View, keep: int) -> Selection:
  """Keeps the image pivots and, for each pivot in turn, the tokens least similar to it.

  Pivots are the image and the instruction tokens whose keys in the previous layer have the largest L1 norm. Similarity
  is the cosine of hidden states. If the instruction has fewer tokens than pivots, its strongest token fills the rest.
  The remainder of `keep` after dividing by the pivots goes to the first of them.
  """
  norms = jnp.abs(view.key.astype(jnp.float32)).sum(axis=(2, 3))
  image_slots, present = view.layout.image_slots(), view.layout.image_present()
  num_pivots = min(NUM_PIVOTS, keep)
  image_pivots = stable_top_k(jnp.where(present, take_slots(norms, image_slots), -1.0), num_pivots)
  text_slots, valid = view.layout.instruction_slots()
  text_norms = jnp.where(valid, take_slots(norms, text_slots), -1.0)
  text_pivots = stable_top_k(text_norms, min(NUM_PIVOTS, text_norms.shape[1]))
  text_pivots = jnp.where(take_slots(text_norms, text_pivots) >= 0, text_pivots, text_pivots[:, :1])
  pivot_slots = jnp.concatenate([take_slots(image_slots, image_pivots), take_slots(text_slots, text_pivots)], axis=1)
  similarity = cosine_similarity(take_slots(view.x, pivot_slots), view.image_tokens())
  taken = mark(image_pivots, similarity.shape[2])
  share, rest = divmod(keep - num_pivots, similarity.shape[1])
  for pivot in range(similarity.shape[1]):
    count = share + (pivot < rest)
    candidate = jnp.where(present, -similarity[:, pivot], jnp.finfo(jnp.float32).min)
    chosen = stable_top_k(jnp.where(taken, -jnp.inf, candidate), count)
    taken |= mark(chosen, similarity.shape[2])
  return Selection(jnp.sort(stable_top_k(taken.astype(jnp.float32), keep), axis=1))


def cost(sizes: Sizes) -> int:
  """Similarities of the pivots and every image token."""
  return 2 * NUM_PIVOTS * sizes.num_present * sizes.model.hidden_size


CRITERION = Criterion(unlike_pivots, cost)
METHODS = {"dart": Method("arXiv 2502.11494, 128 tokens", (CRITERION,), (2,), (128 / 576,), needs=SEQUENCE)}
