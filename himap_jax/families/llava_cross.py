"""LLaVA's tower and connector, with a decoder that reads pictures by the cross-attention layers of Llama-3.2-Vision.

The second demo model is of this family; no other published model is. `text_config` is transformers' `MllamaTextConfig`,
with a tied head and without embeddings besides the vocabulary's.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from himap_jax.families import files, llava
from himap_jax.families.examples import expand_across
from himap_jax.families.family import Family, Question
from himap_jax.families.text import check_cross_layers, cross_text_config
from himap_jax.inputs import Example, Images
from himap_jax.model.config import ConnectorConfig, ModelConfig


def config(fields: dict[str, Any], where: str) -> ModelConfig:
  """The sizes described by a `config.json`; raises `UserError` as `llava.config` and `mllama.config` do."""
  check_cross_layers(fields.get("text_config") or {}, where)
  complete = files.read_config("LlavaConfig", fields, where)
  text = cross_text_config(complete.text_config, where, tied=True)
  connector = ConnectorConfig(complete.projector_hidden_act, complete.multimodal_projector_bias)
  return ModelConfig(llava.vision_config(complete, where), connector, text, complete.image_token_id)


def load_processor(directory: pathlib.Path) -> files.ModelFiles:
  """Loads the tokenizer and the image processor, which transformers' own classes for the unknown model type cannot."""
  return files.load(directory, "CLIPImageProcessorPil", "PreTrainedTokenizerFast")


class CrossProcessor(llava.LlavaProcessor):
  """Prepares prompts in which `<image>` is text, and image tokens follow it that only cross-attention reads."""

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    ids = self.ids(self.prompt(question, len(images)))
    tiles = Images(self.pixels(images))
    return expand_across(ids, self._config.image_token_id, self.num_image_tokens, tiles, len(images))


FAMILIES = (Family("llava_cross", config, llava.complete, load_processor, CrossProcessor),)
