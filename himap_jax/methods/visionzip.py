"""VisionZip: dominant tokens by the class token's attention, the rest merged into contextual ones.

Its authors keep the class token too; here the decoder sees image tokens only.
"""

import jax
import jax.numpy as jnp

from himap_jax.method import Criterion, Method, Selection, Sizes, View, cosine_similarity, mark, top

CONTEXTUAL_SHARE = 10 / 64


def dominant_and_contextual(view: View, keep: int) -> Selection:
  """The highest class attention, and evenly spaced others, to each of which the mean of those most like it is added.

  Likeness is the cosine between the feature layer's keys, averaged over heads.
  """
  num_contextual = round(CONTEXTUAL_SHARE * keep)
  num_dominant = keep - num_contextual
  features, attention = view.tower.features, view.tower.class_attention
  num_tokens = features.shape[1]
  dominant = top(attention, num_dominant)
  if num_contextual == 0 or keep == num_tokens:
    return Selection(jnp.sort(top(attention, keep), axis=1))
  is_dominant = mark(dominant, num_tokens)
  others = jnp.argsort(is_dominant, axis=1, stable=True)[:, : num_tokens - num_dominant]
  targets = others[:, :: others.shape[1] // num_contextual][:, :num_contextual]
  merges = ~(is_dominant | mark(targets, num_tokens))
  keys = view.tower.keys.mean(axis=2)
  similarity = cosine_similarity(keys, jnp.take_along_axis(keys, targets[:, :, None], axis=1))
  assigned = jax.nn.one_hot(similarity.argmax(axis=2), num_contextual, dtype=jnp.float32) * merges[:, :, None].astype(
    jnp.float32
  )
  sums = jnp.einsum("BNC,BNF->BCF", assigned, features.astype(jnp.float32), precision="highest")
  means = sums / jnp.maximum(assigned.sum(axis=1), 1.0)[:, :, None]
  features = jax.vmap(lambda x, at, added: x.at[at].add(added))(features, targets, means.astype(features.dtype))
  kept = jnp.sort(jnp.concatenate([dominant, targets], axis=1), axis=1)
  return Selection(kept, view.project(jnp.take_along_axis(features, kept[:, :, None], axis=1)))


def cost(sizes: Sizes) -> int:
  """The class token's attention, similarities of keys, sums of features, and projecting what was merged."""
  num_contextual = round(CONTEXTUAL_SHARE * sizes.keep)
  vision = sizes.config.vision
  width = vision.hidden_size // vision.num_attention_heads + sizes.config.num_features
  return sizes.class_attention() + sizes.num_image_tokens * num_contextual * width + sizes.project(sizes.keep)


METHOD = Method(
  source="arXiv 2412.04467, 54 + 10 tokens",
  criteria=(Criterion(dominant_and_contextual, cost),),
  acts="before",
  prune_layers=(0,),
  keep=(64 / 576,),
  needs_class_attention=True,
)
