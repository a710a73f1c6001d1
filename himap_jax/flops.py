"""FLOPs of a prefill, in the two conventions that papers on token pruning use, and cache bytes.

Every figure counts a multiplication as one operation, as FastV (arXiv 2403.06764) and HiMAP (arXiv 2503.13108, Eq. 10) do.
"""

from himap_jax.config import TextConfig
from himap_jax.schedule import Schedule


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
