"""Fields of config.json that no model has are refused, before anything is built of them."""

import copy

import pytest

from himap_jax.errors import UserError
from himap_jax.families import from_hf

LLAVA = {
  "model_type": "llava",
  "text_config": {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 300},
  "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 4}
  | {"image_size": 28, "patch_size": 7},
  "image_token_index": 3,
}


@pytest.mark.parametrize(
  ("part", "name", "value", "message"),
  [
    (
      "text_config",
      "num_hidden_layers",
      10**9,
      "num_hidden_layers is 1000000000; needed: a whole number from 1 to 512",
    ),
    ("text_config", "hidden_size", 0, "hidden_size is 0; needed"),
    ("text_config", "intermediate_size", -1, "intermediate_size is -1"),
    ("text_config", "vocab_size", 0, "vocab_size is 0"),
    ("text_config", "vocab_size", None, "vocab_size is None"),
    ("text_config", "num_attention_heads", True, "num_attention_heads is True"),
    ("text_config", "num_key_value_heads", 3, "4 heads are no multiple of 3 key heads"),
    ("text_config", "head_dim", 5, "transformers cannot read it .*even rotary dimension, but got `head_dim`=5"),
    ("text_config", "rope_theta", "x", "rope_theta is 'x'; needed: a number above 0"),
    ("text_config", "rms_norm_eps", float("inf"), "rms_norm_eps is inf"),
    ("text_config", "hidden_act", ["silu"], "hidden_act is .*; needed: a text"),
    ("text_config", "hidden_act", "", "activation None is not supported"),
    ("vision_config", "patch_size", 0, "patch_size is 0"),
    ("vision_config", "patch_size", 29, "0 patches of 29 pixels in a picture of 28"),
    ("vision_config", "image_size", 10**9, "image_size is 1000000000"),
    ("vision_config", "image_size", 4096, "342,225 patches of 7 pixels"),
    (
      "vision_config",
      "num_attention_heads",
      5,
      r"transformers cannot read it \(The hidden size \(32\) is not a multiple",
    ),
    (None, "text_config", [], r"text_config is \[\]; needed: an object"),
    (None, "image_token_index", -1, "image_token_index is -1; needed: the id of a token"),
    (None, "model_type", ["llava"], "model_type is .*; needed: a text"),
  ],
)
def test_fields_that_no_model_has(part, name, value, message):
  assert from_hf(LLAVA).image_token_id == 3
  fields = copy.deepcopy(LLAVA)
  (fields if part is None else fields[part])[name] = value
  with pytest.raises(UserError, match=f"^some/config.json: {message}") as error:
    from_hf(fields, where="some/config.json")
  assert "\n" not in str(error.value)


def test_a_field_that_transformers_cannot_write_back():
  fields = LLAVA | {"model_type": "llava_next", "dtype": []}
  with pytest.raises(UserError, match="^some/config.json: transformers cannot read it"):
    from_hf(fields, where="some/config.json")
