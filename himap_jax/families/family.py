"""The interface of a model family."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from PIL import Image

from himap_jax.inputs import Example, ImageSize
from himap_jax.model.config import ModelConfig

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
  """One message of a conversation; `<image>` in its text stands for the next picture."""

  role: str
  text: str


def problem_of(messages: Sequence[Message]) -> str | None:
  """Why messages are no conversation that can be answered; None if they are one."""
  if messages[-1].role != "user":
    return "the last message must be the user's"
  if any(message.role == "system" for message in messages[1:]):
    return "only the first message may be the system's"
  return None


# A question, or the messages of a conversation.
Question = str | Sequence[Message]


def texts_of(question: Question) -> list[str]:
  """The text of a question, or of each of its messages."""
  return [question] if isinstance(question, str) else [message.text for message in question]


class View(NamedTuple):
  """A picture as the model sees it, on a grid.

  Attributes:
    tokens: `[rows, columns]` the row's image token of each cell, −1 if it has none.
  """

  picture: Image.Image
  tokens: Int[np.ndarray, "rows columns"]


@runtime_checkable
class Processor(Protocol):
  """Prepares prompts for one model.

  Attributes:
    blank: a prompt without pictures, which gives the shapes of tiles and positions.
    image_shape: `(height, width)` of every preprocessed picture or tile, in pixels; None if pictures differ, like the
      next two.
    patch_grid: `(rows, columns)` of patches in such a picture or tile.
    num_image_tokens: image tokens of a picture.
  """

  blank: Example
  image_shape: tuple[int, int] | None
  patch_grid: tuple[int, int] | None
  num_image_tokens: int | None

  def image_size(self, sizes: Sequence[tuple[int, int]]) -> ImageSize:
    """Tiles and image tokens of a row's pictures of these sizes, `(width, height)` in pixels."""

  def prepare(self, images: Sequence[Image.Image], question: Question) -> Example:
    """Fills the template, tokenises it and preprocesses the pictures.

    `<image>` in a question stands for the next picture; without any, all pictures stand where the template has its own.

    Raises:
      UserError: another number of `<image>` than of pictures, no text after the last, an unusable picture, or messages
        that the template cannot hold.
    """

  def prompt(self, question: Question, num_pictures: int = 1) -> str:
    """The filled template."""

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of an answer, without special tokens and surrounding white space."""

  def views(self, example: Example) -> list[View]:
    """The pictures as the model sees them, with their image tokens; raises `UserError` if these form no grid."""

  def places(self, example: Example) -> Int[np.ndarray, "N 4"]:
    """Picture, tile, row and column of every image token; −1 where it has none."""


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family.

  Attributes:
    model_type: as in `config.json`.
    config: maps the fields of `config.json`, and their source for messages, to the sizes; raises `UserError`.
    complete: adds transformers' current defaults to the fields of `config.json`, which pins them.
    load_processor: loads transformers' processor (or an object with its tokenizer and image processor) from a
      checkpoint's directory; raises `UserError`.
    processor: makes a `Processor` from transformers' processor, the sizes, a prompt template, and the most image tokens
      of a picture (None for the checkpoint's own limit); raises `UserError`.
    pad: makes transformers' processor pad pictures to squares; None if this family's pictures are not padded.
    stop_tokens: tokens that end an answer, besides those of generation_config.json, from transformers' processor.
    image_token: what stands for image tokens in a text, from the tokenizer.
  """

  model_type: str
  config: Callable[[dict[str, Any], str], ModelConfig]
  complete: Callable[[dict[str, Any]], dict[str, Any]]
  load_processor: Callable[[pathlib.Path], Any]
  processor: Callable[[Any, ModelConfig, str, int | None], Processor]
  pad: Callable[[Any], Any] | None = None
  stop_tokens: Callable[[Any], tuple[int, ...]] = lambda processor: ()
  image_token: Callable[[Any], str] = lambda tokenizer: "<image>"
