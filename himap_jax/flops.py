"""FLOPs of a prefill, in the two conventions that papers on token pruning use, and cache bytes.

Every figure counts a multiplication as one operation, as FastV (arXiv 2403.06764) and HiMAP (arXiv 2503.13108, Eq. 10) do.
"""

from himap_jax.config import TextConfig
from himap_jax.schedule import Schedule


def image_token_flops(config: TextConfig, schedule: Schedule, num_image_tokens: int) -> int:
  """Operations of the decoder on image tokens alone: 4nd² + 2n²d + 2ndm a layer (HiMAP, Eq. 10)."""
  d, m = config.hidden_size, config.intermediate_size
  return sum(
    (segment.last - segment.first) * (4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m)
    for segment in schedule.segments(config.num_hidden_layers, num_image_tokens)
    for n in [segment.num_image_tokens]
  )


def all_token_flops(config: TextConfig, schedule: Schedule, num_image_tokens: int, num_text_tokens: int) -> int:
  """Operations of the decoder on all tokens of a prompt: queries and outputs 2ndq, keys and values 2ndk, attention
  2n²q, gated feed-forward 3ndm a layer, q and k being the widths of all query and key heads."""
  d, m = config.hidden_size, config.intermediate_size
  q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
  return sum(
    (segment.last - segment.first) * (2 * n * d * (q + k) + 2 * n**2 * q + 3 * n * d * m)
    for segment in schedule.segments(config.num_hidden_layers, num_image_tokens)
    for n in [segment.num_image_tokens + num_text_tokens]
  )


def cache_bytes(
  config: TextConfig, schedule: Schedule, num_image_tokens: int, num_text_slots: int, *, bytes_per_value: int
) -> int:
  """Bytes of one row's keys and values; `num_text_slots` counts padding and decoded tokens too."""
  width = 2 * config.num_key_value_heads * config.head_dim * bytes_per_value
  return sum(
    (segment.last - segment.first) * (segment.num_image_tokens + num_text_slots) * width
    for segment in schedule.segments(config.num_hidden_layers, num_image_tokens)
  )
