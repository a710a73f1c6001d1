"""The language models of config.json: what runs, and what is refused in one line."""

import pytest

from himap_jax.families import from_hf


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ({"model_type": "gpt2"}, "language model 'gpt2' is not supported; supported: llama, mistral, qwen2, qwen3, gemma"),
    (
      {"model_type": "phi3"}
      | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}},
      "RoPE scaling 'longrope' is not supported; supported: default, linear, llama3",
    ),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, "bidirectional attention .* is not supported"),
    ({"model_type": "qwen2", "hidden_act": "gelu_fast"}, "activation 'gelu_fast' is not supported"),
  ],
)
def test_what_does_not_run_is_refused(text, message):
  with pytest.raises(ValueError, match=f"^config.json: {message}") as error:
    from_hf({"model_type": "llava", "text_config": text})
  assert "\n" not in str(error.value)


def test_published_sizes():
  """Mistral's window, and a window as long as the context, which is none."""
  text = {"model_type": "phi3", "max_position_embeddings": 4096, "sliding_window": 2047}
  own = from_hf({"model_type": "llava", "text_config": text}).text
  assert own.sliding_window == own.window(31) == 2047 and own.rotary_dim == own.head_dim == 96
  text = {"model_type": "mistral", "max_position_embeddings": 4096, "sliding_window": 4096}
  assert from_hf({"model_type": "llava", "text_config": text}).text.sliding_window is None
  own = from_hf({"model_type": "llava", "text_config": {"model_type": "gemma"}}).text
  assert (own.head_dim, own.embedding_scale, own.norm_offset) == (256, 3072**0.5, True) and own.tie_word_embeddings
