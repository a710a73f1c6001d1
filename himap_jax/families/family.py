"""The interface of a model family."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from himap_jax.inputs import Example
from himap_jax.model.config import ModelConfig


@runtime_checkable
class Processor(Protocol):
  """Prepares prompts for one model.

  Attributes:
    image_shape: `(height, width)` of every preprocessed image, in pixels.
    patch_grid: `(rows, columns)` of patches in such an image.
    num_image_tokens: image tokens of a picture.
  """

  image_shape: tuple[int, int]
  patch_grid: tuple[int, int]
  num_image_tokens: int

  def prepare(self, images: Sequence[Image.Image], question: str) -> Example:
    """Fills the template, tokenises it and preprocesses the pictures.

    `<image>` in a question stands for the next picture; without any, all pictures stand where the template has its own.

    Raises:
      UserError: another number of `<image>` than of pictures, no text after the last, or an unusable picture.
    """

  def prompt(self, question: str, num_pictures: int = 1) -> str:
    """The filled template."""

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens and surrounding white space."""

  def pictures(self, example: Example) -> list[Image.Image]:
    """The pictures as the model sees them: resized, and cropped to whole patches."""


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family.

  Attributes:
    model_type: as in `config.json`.
    config: maps the fields of `config.json`, and their source for messages, to the sizes; raises `UserError`.
    complete: adds transformers' current defaults to the fields of `config.json`, which pins them.
    load_processor: loads transformers' processor (or an object with its tokenizer and image processor) from a
      checkpoint's directory; raises `UserError`.
    processor: makes a `Processor` from transformers' processor, the sizes and a prompt template; raises `UserError`.
    stop_tokens: tokens that end an answer, besides those of generation_config.json, from transformers' processor.
  """

  model_type: str
  config: Callable[[dict[str, Any], str], ModelConfig]
  complete: Callable[[dict[str, Any]], dict[str, Any]]
  load_processor: Callable[[pathlib.Path], Any]
  processor: Callable[[Any, ModelConfig, str], Processor]
  stop_tokens: Callable[[Any], tuple[int, ...]] = lambda processor: ()
