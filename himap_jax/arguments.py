"""Validates arguments of the public API."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from himap_jax.errors import UserError, check_text
from himap_jax.families.family import Message, texts_of
from himap_jax.pruning.schedule import Schedule


def check_questions(images: Any, questions: Any) -> None:
  """Raises `UserError` unless there are pictures, or a list of them, for each question, with pixels, and text in each question."""
  for name, given in (("images", images), ("questions", questions)):
    if not _is_list(given):
      raise UserError(f"{name} must be a list with an entry for each question, not {_kind(given)}")
  if len(images) != len(questions):
    raise UserError(
      f"there must be an entry of images for each question, but there are {len(images)} for {len(questions)}"
    )
  for number, (own, question) in enumerate(zip(images, questions, strict=True)):
    for picture in own if _is_list(own) else [own]:
      if not isinstance(picture, Image.Image):
        raise UserError(
          f"images[{number}] must be a PIL image or a list of them, not {_kind(picture)}; PIL.Image.open reads a file, "
          "PIL.Image.fromarray an array"
        )
      if 0 in picture.size:
        raise UserError(f"images[{number}] has a picture without pixels, of {picture.width} x {picture.height}")
    if not isinstance(question, str) and not (_is_list(question) and all(isinstance(m, Message) for m in question)):
      raise UserError(f"questions[{number}] must be a text or a list of messages, not {_kind(question)}")
    if not question or (isinstance(question, str) and not question.strip()):
      raise UserError(f"questions[{number}] is empty")
    for text in texts_of(question):
      check_text(f"questions[{number}]", text)


def check_schedule(schedule: Any) -> None:
  """Raises `UserError` unless it is a schedule."""
  if not isinstance(schedule, Schedule):
    raise UserError(f"schedule must be what LoadedModel.schedule makes, or be left out, not {schedule!r:.100}")


def _is_list(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
  return f"{type(value).__name__} {value!r:.60}" if isinstance(value, str) else f"a {type(value).__name__}"
