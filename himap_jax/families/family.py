"""What a model family provides."""

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
    image_shape: `(height, width)` in pixels of every preprocessed image.
    patch_grid: `(rows, columns)` of patches in such an image.
    num_image_tokens: image tokens of every prompt.
  """

  image_shape: tuple[int, int]
  patch_grid: tuple[int, int]
  num_image_tokens: int

  def prepare(self, image: Image.Image, question: str) -> Example:
    """Fills the template, tokenises it and preprocesses the picture.

    Raises:
      UserError: a prompt or picture that the model cannot take.
    """

  def prompt(self, question: str) -> str:
    """The text of a prompt."""

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens and surrounding white space."""

  def picture(self, example: Example) -> Image.Image:
    """The picture as the model sees it: resized, and cropped to whole patches."""


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family.

  Attributes:
    model_type: as `config.json` names it.
    config: from the fields of `config.json`, and where these come from, to the model's sizes; raises `UserError`.
    complete: every field of `config.json` that transformers knows of the model, so that its defaults may change.
    load_processor: from a checkpoint's directory to transformers' processor; raises `UserError`.
    processor: from transformers' processor, the model's sizes and a prompt template to a `Processor`; raises
      `UserError`.
  """

  model_type: str
  config: Callable[[dict[str, Any], str], ModelConfig]
  complete: Callable[[dict[str, Any]], dict[str, Any]]
  load_processor: Callable[[pathlib.Path], Any]
  processor: Callable[[Any, ModelConfig, str], Processor]
