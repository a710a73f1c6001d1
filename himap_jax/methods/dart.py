"""DART: tokens that are unlike a few pivots, hence unlike each other."""

import jax.numpy as jnp

from himap_jax.method import Criterion, Method, Selection, Sizes, View, cosine_similarity, mark, top

NUM_PIVOTS = 4  # of image tokens, and as many of text tokens


def unlike_pivots(view: View, keep: int) -> Selection:
  """The pivots among the image tokens and, for each pivot in turn, the tokens that are least similar to it.

  Pivots are the image tokens and the instruction tokens whose keys in the layer before have the largest L1 norm. The
  similarity is the cosine between hidden states. Where the instruction has fewer tokens than pivots, the first one's
  strongest stands for the rest. What `keep` leaves after dividing by the pivots goes to the first of them.
  """
  num_slots = view.x.shape[1]
  norms = jnp.abs(view.projections.key.astype(jnp.float32)).sum(axis=(2, 3))
  image_slots = view.layout.image_slots()
  num_pivots = min(NUM_PIVOTS, keep)
  image_pivots = top(jnp.take_along_axis(norms, image_slots, axis=1), num_pivots)
  text_slots, valid = view.layout.instruction_slots(num_slots)
  text_norms = jnp.where(valid, jnp.take_along_axis(norms, text_slots, axis=1), -1.0)
  text_pivots = top(text_norms, min(NUM_PIVOTS, text_norms.shape[1]))
  found = jnp.take_along_axis(text_norms, text_pivots, axis=1)
  text_pivots = jnp.where(found >= 0, text_pivots, text_pivots[:, :1])
  pivot_slots = jnp.concatenate(
    [
      jnp.take_along_axis(image_slots, image_pivots, axis=1),
      jnp.take_along_axis(text_slots, text_pivots, axis=1),
    ],
    axis=1,
  )
  pivots = jnp.take_along_axis(view.x, pivot_slots[:, :, None], axis=1)
  similarity = cosine_similarity(pivots, view.image_tokens())
  taken = mark(image_pivots, similarity.shape[2])
  share, rest = divmod(keep - num_pivots, similarity.shape[1])
  for pivot in range(similarity.shape[1]):
    count = share + (pivot < rest)
    chosen = top(jnp.where(taken, -jnp.inf, -similarity[:, pivot]), count)
    taken |= mark(chosen, similarity.shape[2])
  return Selection(jnp.sort(top(taken.astype(jnp.float32), keep), axis=1))


def cost(sizes: Sizes) -> int:
  """Products of the pivots with every image token."""
  return 2 * NUM_PIVOTS * sizes.num_present * sizes.config.text.hidden_size


METHOD = Method(
  source="arXiv 2502.11494, 128 tokens",
  criteria=(Criterion(unlike_pivots, cost),),
  prune_layers=(2,),
  keep=(128 / 576,),
)
