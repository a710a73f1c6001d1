"""What a schedule costs: FLOPs of prefill and decode in the two conventions that papers on token pruning use, cache bytes.

Every figure counts products of matrices, and a multiplication as one operation, as FastV (arXiv 2403.06764) and HiMAP (arXiv 2503.13108, Eq. 10) do.
"""

import dataclasses

from himap_jax.config import LlavaConfig, TextConfig
from himap_jax.method import Sizes
from himap_jax.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Costs:
  """What one row costs; operations are multiplications.

  Attributes:
    image_tokens: the decoder's prefill on image tokens alone (HiMAP, Eq. 10).
    tower: the vision tower, up to the last layer that is needed.
    projector: the projector on every image token.
    decoder: the decoder's prefill on all tokens.
    scoring: choosing tokens, and projecting those that were merged.
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
    """Everything up to the first new token."""
    return self.tower + self.projector + self.decoder + self.scoring + self.head


def costs(
  config: LlavaConfig, schedule: Schedule, num_image_tokens: int, num_text_tokens: int, *, bytes_per_value: int = 2
) -> Costs:
  """Accounts for one prompt.

  Args:
    config: the model.
    schedule: what happens to the image tokens.
    num_image_tokens: before pruning.
    num_text_tokens: of the prompt; criteria count all of them as instruction.
    bytes_per_value: of the cache.
  """
  text = config.text
  entering = [count for count, _ in _layers(text, schedule, num_image_tokens)]
  head = text.hidden_size * text.vocab_size
  return Costs(
    image_tokens=image_token_flops(text, schedule, num_image_tokens),
    tower=tower_flops(config, num_image_tokens),
    projector=Sizes(config, num_image_tokens, num_image_tokens, num_text_tokens, num_image_tokens).project(
      num_image_tokens
    ),
    decoder=all_token_flops(text, schedule, num_image_tokens, num_text_tokens),
    scoring=scoring_flops(config, schedule, num_image_tokens, num_text_tokens),
    head=head,
    decode=decode_flops(text, schedule, num_image_tokens, num_text_tokens) + head,
    cache_bytes=cache_bytes(text, schedule, num_image_tokens, num_text_tokens, bytes_per_value=bytes_per_value),
    mean_tokens_in=sum(entering) / len(entering),
    mean_tokens_out=sum([*entering[1:], entering[-1]]) / len(entering),
  )


def tower_flops(config: LlavaConfig, num_image_tokens: int) -> int:
  """Operations of the vision tower: 4nw² + 2n²w + 2nwm a layer, and the patch embedding."""
  vision = config.vision
  num_tokens = num_image_tokens + (config.vision_feature_select_strategy == "default")
  num_patches = num_tokens - vision.has_class_token
  w, m = vision.hidden_size, vision.intermediate_size
  layer = 4 * num_tokens * w**2 + 2 * num_tokens**2 * w + 2 * num_tokens * w * m
  return max(config.vision_feature_layers) * layer + num_patches * 3 * vision.patch_size**2 * w


def scoring_flops(config: LlavaConfig, schedule: Schedule, num_image_tokens: int, num_text_tokens: int) -> int:
  """Operations of choosing tokens, over all stages."""
  total, present = 0, num_image_tokens
  for stage in schedule.stages:
    total += stage.criterion.cost(Sizes(config, num_image_tokens, present, num_text_tokens, stage.keep))
    present = stage.keep
  return total


def decode_flops(config: TextConfig, schedule: Schedule, num_image_tokens: int, num_text_tokens: int) -> int:
  """Operations of the decoder's layers on one new token, which sees the kept tokens, the text and itself."""
  d, m = config.hidden_size, config.intermediate_size
  q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
  return sum(
    2 * d * q + 2 * d * k + 2 * (num_image + num_text_tokens + 1) * q + 3 * d * m
    for num_image, _ in _layers(config, schedule, num_image_tokens)
  )


def _layers(config: TextConfig, schedule: Schedule, num_image_tokens: int) -> list[tuple[int, bool]]:
  """For every layer its image tokens, and whether it is frozen to them."""
  segments = schedule.segments(config.num_hidden_layers, num_image_tokens)
  return [
    (segment.num_image_tokens, layer in schedule.frozen_layers)
    for segment in segments
    for layer in range(segment.first, segment.last)
  ]


def image_token_flops(config: TextConfig, schedule: Schedule, num_image_tokens: int) -> int:
  """Operations of the decoder on image tokens alone: 4nd² + 2n²d + 2ndm a layer (HiMAP, Eq. 10).

  In a layer that does not update image tokens, their keys and values remain: 2nd².
  """
  d, m = config.hidden_size, config.intermediate_size
  return sum(
    2 * n * d**2 if frozen else 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    for n, frozen in _layers(config, schedule, num_image_tokens)
  )


def all_token_flops(config: TextConfig, schedule: Schedule, num_image_tokens: int, num_text_tokens: int) -> int:
  """Operations of the decoder on all tokens of a prompt.

  A layer takes 2udq for queries and outputs, 2ndk for keys and values, 2unq for attention and 3udm for the gated
  feed-forward: n tokens, of which u are updated (all of them, or the text where image tokens are frozen), q and k being
  the widths of all query and key heads.
  """
  d, m = config.hidden_size, config.intermediate_size
  q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
  total = 0
  for num_image, frozen in _layers(config, schedule, num_image_tokens):
    n = num_image + num_text_tokens
    updated = num_text_tokens if frozen else n
    total += 2 * updated * d * q + 2 * n * d * k + 2 * updated * n * q + 3 * updated * d * m
  return total


def cache_bytes(
  config: TextConfig, schedule: Schedule, num_image_tokens: int, num_text_slots: int, *, bytes_per_value: int
) -> int:
  """Bytes of one row's keys and values; `num_text_slots` counts padding and decoded tokens too."""
  width = 2 * config.num_key_value_heads * config.head_dim * bytes_per_value
  return sum(
    (segment.last - segment.first) * (segment.num_image_tokens + num_text_slots) * width
    for segment in schedule.segments(config.num_hidden_layers, num_image_tokens)
  )
