"""Costs of a schedule: FLOPs in the two conventions of papers on token pruning, and bytes of the cache.

All figures count matrix products, and a multiplication as one operation, as FastV (arXiv 2403.06764) and HiMAP (arXiv
2503.13108, Eq. 10) do. If rows keep different counts, `Schedule.with_counts` gives a row's own.
"""

import dataclasses

from himap_jax.pruning.schedule import Schedule
from himap_jax.pruning.sizes import ModelSizes as ModelSizes
from himap_jax.pruning.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class Costs:
  """Costs of one row; operations are multiplications.

  Attributes:
    image_tokens: decoder prefill on image tokens alone (HiMAP, Eq. 10).
    tower: vision tower, up to the last layer run.
    projector: connector on every image token.
    decoder: decoder prefill on all tokens.
    scoring: selecting tokens, and projecting merged ones.
    head: logits of the last token.
    decode: one decoded token right after the prompt.
    cache_bytes: keys and values of the prompt.
    mean_tokens_in: image tokens that enter a layer, averaged over layers.
    mean_tokens_out: image tokens that leave a layer for the next, averaged over layers.
  """

  image_tokens: int
  tower: int
  projector: int
  decoder: int
  scoring: int
  head: int
  decode: int
  cache_bytes: int
  mean_tokens_in: float
  mean_tokens_out: float

  @property
  def prefill(self) -> int:
    """All operations up to the first new token."""
    return self.tower + self.projector + self.decoder + self.scoring + self.head


def costs(
  sizes: ModelSizes, schedule: Schedule, num_image_tokens: int, num_text_tokens: int, bytes_per_value: int = 2
) -> Costs:
  """Costs of one prompt, from its image tokens before pruning and its text tokens.

  All text tokens count as instruction; `bytes_per_value` is that of the cache.
  """
  entering = [count for count, _ in _layers(sizes, schedule, num_image_tokens)]
  head = sizes.hidden_size * sizes.vocab_size
  return Costs(
    image_tokens=image_token_flops(sizes, schedule, num_image_tokens),
    tower=tower_flops(sizes, num_image_tokens),
    projector=num_image_tokens * sizes.connector_flops_per_token,
    decoder=all_token_flops(sizes, schedule, num_image_tokens, num_text_tokens),
    scoring=scoring_flops(sizes, schedule, num_image_tokens, num_text_tokens),
    head=head,
    decode=decode_flops(sizes, schedule, num_image_tokens, num_text_tokens) + head,
    cache_bytes=cache_bytes(sizes, schedule, num_image_tokens, num_text_tokens, bytes_per_value=bytes_per_value),
    mean_tokens_in=sum(entering) / len(entering),
    mean_tokens_out=sum([*entering[1:], entering[-1]]) / len(entering),
  )


def tower_flops(sizes: ModelSizes, num_image_tokens: int) -> int:
  """Operations of the vision tower: 4nw² + 2n²w + 2nwm per layer, and the patch embedding."""
  num_tokens = num_image_tokens + sizes.drops_first_token
  num_patches = num_tokens - sizes.has_class_token
  w, m = sizes.tower_width, sizes.tower_feed_forward
  layer = 4 * num_tokens * w**2 + 2 * num_tokens**2 * w + 2 * num_tokens * w * m
  return sizes.tower_layers * layer + num_patches * 3 * sizes.patch_size**2 * w


def scoring_flops(sizes: ModelSizes, schedule: Schedule, num_image_tokens: int, num_text_tokens: int) -> int:
  """Operations of selecting tokens, over all stages."""
  total, present = 0, num_image_tokens
  for stage in schedule.stages:
    total += stage.criterion.cost(Sizes(sizes, num_image_tokens, present, num_text_tokens, stage.keep))
    present = stage.keep
  return total


def decode_flops(sizes: ModelSizes, schedule: Schedule, num_image_tokens: int, num_text_tokens: int) -> int:
  """Operations of the decoder's layers on one new token, which attends to kept tokens, text and itself."""
  d, m, q, k = sizes.hidden_size, sizes.intermediate_size, sizes.query_width, sizes.key_width
  return sum(
    2 * d * q + 2 * d * k + 2 * (num_image + num_text_tokens + 1) * q + 3 * d * m
    for num_image, _ in _layers(sizes, schedule, num_image_tokens)
  )


def image_token_flops(sizes: ModelSizes, schedule: Schedule, num_image_tokens: int) -> int:
  """Operations of the decoder on image tokens alone: 4nd² + 2n²d + 2ndm per layer (HiMAP, Eq. 10).

  A layer that does not update image tokens still computes their keys and values: 2nd².
  """
  d, m = sizes.hidden_size, sizes.intermediate_size
  return sum(
    2 * n * d**2 if frozen else 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    for n, frozen in _layers(sizes, schedule, num_image_tokens)
  )


def all_token_flops(sizes: ModelSizes, schedule: Schedule, num_image_tokens: int, num_text_tokens: int) -> int:
  """Operations of the decoder on all tokens of a prompt.

  A layer takes 2udq for queries and outputs, 2ndk for keys and values, 2unq for attention and 3udm for the gated
  feed-forward. Of its n tokens u are updated: all, or only the text if image tokens are frozen; q and k are the total
  widths of query and key heads.
  """
  d, m, q, k = sizes.hidden_size, sizes.intermediate_size, sizes.query_width, sizes.key_width
  total = 0
  for num_image, frozen in _layers(sizes, schedule, num_image_tokens):
    n = num_image + num_text_tokens
    updated = num_text_tokens if frozen else n
    total += 2 * updated * d * q + 2 * n * d * k + 2 * updated * n * q + 3 * updated * d * m
  return total


def cache_bytes(
  sizes: ModelSizes, schedule: Schedule, num_image_tokens: int, num_text_slots: int, *, bytes_per_value: int
) -> int:
  """Bytes of one row's keys and values; `num_text_slots` includes padding and decoded tokens."""
  slots = sum(count + num_text_slots for count, _ in _layers(sizes, schedule, num_image_tokens))
  return slots * 2 * sizes.key_width * bytes_per_value


def _layers(sizes: ModelSizes, schedule: Schedule, num_image_tokens: int) -> list[tuple[int, bool]]:
  """Image tokens of each layer, and whether it is frozen."""
  return [
    (segment.num_image_tokens, layer in schedule.frozen_layers)
    for segment in schedule.segments(sizes.num_layers, num_image_tokens)
    for layer in range(segment.first, segment.last)
  ]
