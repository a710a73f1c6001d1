"""Validates arguments of the public API."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from himap_jax.engine.accounting import provides
from himap_jax.errors import UserError, check_is, check_text
from himap_jax.families.family import ROLES, Message, problem_of, texts_of
from himap_jax.model.config import ModelConfig
from himap_jax.pruning.methods import METHODS
from himap_jax.pruning.schedule import Schedule, Stage


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
    if not isinstance(question, str):
      _check_messages(question, f"questions[{number}]")
    for text in texts_of(question):
      check_text(f"questions[{number}]", text)


def _check_messages(messages: Sequence[Message], name: str) -> None:
  """Raises `UserError` for a conversation that a row of a prompt file may not hold either."""
  for number, message in enumerate(messages):
    if message.role not in ROLES:
      raise UserError(f"{name}[{number}] has the role {message.role!r:.60}; needed: {', '.join(ROLES)}")
    check_is(f"the text of {name}[{number}]", message.text, str, "a text")
  if problem := problem_of(messages):
    raise UserError(f"{name}: {problem}")


def check_schedule(schedule: Any) -> None:
  """Raises `UserError` unless it is a schedule of stages."""
  if not isinstance(schedule, Schedule):
    raise UserError(f"schedule must be what LoadedModel.schedule makes, or be left out, not {schedule!r:.100}")
  if not isinstance(schedule.stages, tuple) or not all(isinstance(stage, Stage) for stage in schedule.stages):
    raise UserError(f"the stages of a schedule must be a tuple of Stage, not {schedule.stages!r:.100}")


def check_fits(schedule: Schedule, config: ModelConfig) -> None:
  """Raises `UserError` if a schedule's stages read what this model lacks, so that it was made for another one."""
  cross_layers, first = config.text.cross_attention_layers, 0
  is_fit = not (cross_layers and (schedule.restore or schedule.keep_positions or schedule.frozen_layers))
  for stage in schedule.stages:
    methods = [method for method in METHODS.values() if stage.criterion in method.criteria]
    is_fit &= not methods or any(method.needs <= provides(config) for method in methods)
    if cross_layers and methods and all(method.acts == "inside" for method in methods):
      read = [stage.layer] if methods[0].reads_next_layer else range(first, stage.layer)
      is_fit &= not set(cross_layers).isdisjoint(read)
    first = stage.layer
  if not is_fit:
    raise UserError("the schedule was made for another model, which has what this one lacks; use this model's schedule")


def with_shares(keep: Any) -> Any:
  """What to keep, with a float for every share, of whatever type of number."""
  if not isinstance(keep, tuple | list):
    return keep
  is_share = [isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) for value in keep]
  return tuple(float(value) if own else value for value, own in zip(keep, is_share, strict=True))


def pairs_of(parameters: Any) -> tuple[tuple[Any, Any], ...]:
  """A method's parameters as pairs; raises `UserError` unless they are a dictionary or absent."""
  if parameters is None:
    return ()
  check_is("parameters", parameters, Mapping, "a dictionary of numbers by name")
  return tuple(parameters.items())


def _is_list(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
  return f"{type(value).__name__} {value!r:.60}" if isinstance(value, str) else f"a {type(value).__name__}"
