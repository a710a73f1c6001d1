"""Rotary frequencies, bit for bit those of transformers."""

import numpy as np
import pytest
import tiny_checkpoints
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from himap_jax.families import from_hf
from himap_jax.model import rope

DEFAULTS = [{"rope_type": "default", "rope_theta": theta} for theta in (10_000.0, 100_000.0, 500_000.0)]


@pytest.mark.parametrize("parameters", [*DEFAULTS, tiny_checkpoints.LINEAR_ROPE, tiny_checkpoints.LLAMA3_ROPE])
@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_frequencies(parameters, head_dim):
  text = tiny_checkpoints.LLAMA | {"head_dim": head_dim, "rope_parameters": parameters}
  expected = LlamaRotaryEmbedding(transformers.LlamaConfig(**text)).inv_freq.numpy()
  config = transformers.LlavaConfig(vision_config=tiny_checkpoints.CLIP, text_config=text, image_token_index=3)
  actual = rope.frequencies(from_hf(config.to_dict()).text.rope, head_dim)
  np.testing.assert_array_equal(actual, expected)


def test_a_part_of_every_head_is_rotated():
  """With the frequencies of that part alone."""
  text = tiny_checkpoints.SPECS["phi3"][1] | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
  expected = Phi3RotaryEmbedding(transformers.Phi3Config(**text, pad_token_id=2)).inv_freq.numpy()
  config = transformers.LlavaConfig(vision_config=tiny_checkpoints.CLIP, text_config=text, image_token_index=3)
  own = from_hf(config.to_dict()).text
  assert (own.head_dim, own.rotary_dim) == (32, 16)
  np.testing.assert_array_equal(rope.frequencies(own.rope, own.rotary_dim), expected)
