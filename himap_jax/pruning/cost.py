"""Costs of a schedule: FLOPs in the two conventions of papers on token pruning, and bytes of the cache.

All figures count matrix products, and a multiplication as one operation, as FastV (arXiv 2403.06764) and HiMAP (arXiv
2503.13108, Eq. 10) do. If rows keep different counts, `Schedule.with_counts` gives a row's own.
"""

import dataclasses

from himap_jax.pruning.schedule import Schedule
from himap_jax.pruning.sizes import ModelSizes, Sizes


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
  sizes: ModelSizes,
  schedule: Schedule,
  num_image_tokens: int,
  num_text_tokens: int,
  bytes_per_value: int = 2,
  *,
  num_pictures: int = 1,
) -> Costs:
  """Costs of one prompt, from its image tokens before pruning and its text tokens.

  All text tokens count as instruction; `bytes_per_value` is that of the cache. `num_pictures` counts the tiles of the
  pictures, or the patches in towers for patches, whose attention counts all pairs of a row's patches: those of other
  pictures or windows are computed and masked.

  A decoder layer takes 2udq for queries and outputs, 2ndk for keys and values, 2unq for attention and 3udm for the
  gated feed-forward. Of its n tokens u are updated: all, or only the text if image tokens are frozen; q and k are the
  total widths of query and key heads. On image tokens alone HiMAP's Eq. 10 counts 4nd² + 2n²d + 2ndm; a layer that does
  not update them still computes their keys and values: 2nd².

  Image tokens that are no part of the sequence cost nothing but in cross layers: there 2ndk for keys and values (2nd² on
  image tokens alone) and 2unq for attention from the u text tokens.
  """
  d, m, q, k = sizes.hidden_size, sizes.intermediate_size, sizes.query_width, sizes.key_width
  head = d * sizes.vocab_size
  image_tokens = decoder = scoring = slots = 0
  decode, entering = head, []
  for segment in schedule.segments(sizes.num_layers, num_image_tokens):
    image = segment.num_image_tokens
    n = image + num_text_tokens
    for layer in range(segment.first, segment.last):
      is_cross, frozen = layer in sizes.cross_layers, bool(sizes.cross_layers) or layer in schedule.frozen_layers
      present = (image if is_cross else num_text_tokens) if sizes.cross_layers else n
      u = num_text_tokens if frozen else present
      if is_cross or not sizes.cross_layers:
        image_tokens += 2 * image * d**2 if frozen else 4 * image * d**2 + 2 * image**2 * d + 2 * image * d * m
      decoder += 2 * u * d * q + 2 * present * d * k + 2 * u * present * q + 3 * u * d * m
      decode += 2 * d * q + (2 * image * q if is_cross else 2 * d * k + 2 * (present + 1) * q) + 3 * d * m
      slots += present
      entering.append(image)
    if segment.stage is not None:
      at_stage = Sizes(sizes, num_image_tokens, image, num_text_tokens, segment.stage.keep)
      scoring += segment.stage.criterion.cost(at_stage)
  return Costs(
    image_tokens=image_tokens,
    tower=num_pictures * sizes.tower_flops + num_pictures**2 * sizes.tower_flops_per_pair,
    projector=num_pictures * sizes.connector_flops,
    decoder=decoder,
    scoring=scoring,
    head=head,
    decode=decode,
    cache_bytes=slots * 2 * k * bytes_per_value,
    mean_tokens_in=sum(entering) / len(entering),
    mean_tokens_out=sum([*entering[1:], entering[-1]]) / len(entering),
  )
