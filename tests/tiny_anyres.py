"""Random LLaVA-NeXT and LLaVA-OneVision checkpoints, and the same models in torch."""

import dataclasses
import pathlib

import numpy as np
import PIL.Image
import tiny_checkpoints
import torch
import transformers

# Resolutions in tiles, height first: LLaVA-NeXT's.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

NEXT = dict(
  vision=tiny_checkpoints.CLIP,
  text=dict(model_type="mistral", num_key_value_heads=2, sliding_window=150, num_hidden_layers=4),
  image_processor=transformers.LlavaNextImageProcessorPil,
  config=transformers.LlavaNextConfig,
  model=transformers.LlavaNextForConditionalGeneration,
  size="shortest_edge",
  options={},
)
ONEVISION = dict(
  # a side of 31 pixels holds 5 patches of 6, and one pixel that the tower leaves out, as the published 384 / 14 does
  vision=tiny_checkpoints.SIGLIP | dict(image_size=31, vision_use_head=False),
  text=dict(model_type="qwen2", num_key_value_heads=2, num_hidden_layers=4, tie_word_embeddings=True),
  image_processor=transformers.LlavaOnevisionImageProcessorPil,
  config=transformers.LlavaOnevisionConfig,
  model=transformers.LlavaOnevisionForConditionalGeneration,
  size="height",
  options=dict(vision_aspect_ratio="anyres_max_2", video_token_index=270),
)


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A checkpoint on disk, the same model in torch, and transformers' image processor.

  Attributes:
    directory: the checkpoint, in the Hugging Face layout.
    model: float32, eager attention, evaluation mode.
  """

  directory: pathlib.Path
  model: transformers.PreTrainedModel
  image_processor: transformers.BaseImageProcessor

  def pictures(self, images: list[PIL.Image.Image]) -> dict[str, torch.Tensor]:
    """Arguments of `get_image_features`."""
    is_onevision = "batch_num_images" in self.image_processor.model_input_names
    made = self.image_processor([images] if is_onevision else images, return_tensors="np")
    return {name: torch.from_numpy(np.asarray(value)) for name, value in made.items()}


def make(spec: dict, directory: pathlib.Path) -> Tiny:
  """Draws a checkpoint and saves it, with its tokenizer, image processor and chat template."""
  side = spec["vision"]["image_size"]
  pinpoints = [[rows * side, columns * side] for rows, columns in GRIDS]
  config = spec["config"](
    vision_config=spec["vision"],
    text_config=tiny_checkpoints.LLAMA | spec["text"] | dict(bos_token_id=0, eos_token_id=1, pad_token_id=2),
    image_token_index=3,
    image_grid_pinpoints=pinpoints,
    **spec["options"],
  )
  config._attn_implementation = "eager"
  model = spec["model"](config).eval()
  tiny_checkpoints.randomize(model, seed=7)
  model.generation_config = transformers.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
  model.save_pretrained(directory)
  square = {"height": side, "width": side}
  size = {"size": {"shortest_edge": side}, "crop_size": square} if spec["size"] == "shortest_edge" else {"size": square}
  image_processor = spec["image_processor"](**size, image_grid_pinpoints=pinpoints)
  image_processor.save_pretrained(directory)
  tokenizer = tiny_checkpoints.byte_tokenizer()
  tokenizer.chat_template = tiny_checkpoints.CHAT_TEMPLATE
  tokenizer.save_pretrained(directory)
  return Tiny(directory, model, image_processor)
