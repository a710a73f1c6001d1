"""Wrong arguments of the library: each is refused in one line that names it."""

import re

import numpy as np
import pytest
from PIL import Image

import himap_jax
from himap_jax import GenerationConfig, InputConfig, Sampling, UserError, arguments
from himap_jax.errors import check_whole
from himap_jax.families.family import Message
from himap_jax.pruning.config import _check_numbers
from himap_jax.pruning.schedule import Schedule

PICTURE = Image.new("RGB", (8, 8))


def test_every_name_of_the_library_is_found():
  assert "generate" in himap_jax.__all__ and all(
    getattr(himap_jax, name).__name__ == name for name in himap_jax.__all__
  )
  with pytest.raises(AttributeError, match="module 'himap_jax' has no attribute 'nothing'"):
    himap_jax.nothing  # noqa: B018


@pytest.mark.parametrize("own", [PICTURE, [PICTURE, PICTURE], [], ()])
@pytest.mark.parametrize("question", ["Why?", [Message("user", "Why?")]])
def test_what_is_right(own, question):
  arguments.check_questions([own], [question])
  arguments.check_schedule(Schedule())


@pytest.mark.parametrize(
  "images, questions, message",
  [
    ([PICTURE], "Why?", "questions must be a list with an entry for each question, not str 'Why.'"),
    (PICTURE, ["Why?"], "images must be a list with an entry for each question, not a Image"),
    (np.zeros((1, 8, 8, 3)), ["Why?"], "images must be a list with an entry for each question, not a ndarray"),
    ([PICTURE, PICTURE], ["Why?"], "there are 2 for 1"),
    (["a.png"], ["Why?"], "images.0. must be a PIL image or a list of them, not str 'a.png'; PIL.Image.open reads"),
    ([[np.zeros((8, 8, 3))]], ["Why?"], "images.0. must be a PIL image or a list of them, not a ndarray"),
    ([PICTURE, Image.new("RGB", (0, 0))], ["Why?"] * 2, "images.1. has a picture without pixels, of 0 x 0"),
    ([[PICTURE, Image.new("RGB", (0, 5))]], ["Why?"], "images.0. has a picture without pixels, of 0 x 5"),
    ([Image.new("RGB", (5, 0))], ["Why?"], "images.0. has a picture without pixels, of 5 x 0"),
    ([PICTURE], [None], "questions.0. must be a text or a list of messages, not a NoneType"),
    ([PICTURE], [["Why?"]], "questions.0. must be a text or a list of messages, not a list"),
    ([PICTURE, PICTURE], ["Why?", " \n"], "questions.1. is empty"),
    ([PICTURE], [[]], "questions.0. is empty"),
    ([PICTURE, PICTURE], ["Why?", "caf\udce9?"], "questions.1. has an unpaired surrogate, which is not text"),
    ([PICTURE], [[Message("user", "Why?"), Message("user", "\ud800")]], "questions.0. has an unpaired surrogate"),
  ],
)
def test_questions(images, questions, message):
  with pytest.raises(UserError, match=message):
    arguments.check_questions(images, questions)


@pytest.mark.parametrize("schedule", [None, "himap"])
def test_schedules(schedule):
  with pytest.raises(
    UserError, match=f"schedule must be what LoadedModel.schedule makes, or be left out, not {schedule!r}"
  ):
    arguments.check_schedule(schedule)


@pytest.mark.parametrize(
  "value, message",
  [(2.5, "n must be a whole number, but is 2.5"), ("2", "number, but is '2'"), (True, "True"), (0, "1, but is 0")],
)
def test_numbers(value, message):
  with pytest.raises(UserError, match=message):
    check_whole("n", value)
  check_whole("n", np.int32(3))


@pytest.mark.parametrize(
  "kind, changes, message",
  [
    (InputConfig, dict(prompt_template=None), "prompt_template must be a text, but is None"),
    (InputConfig, dict(prompt_buckets=64), "prompt_buckets must be a list of whole numbers, but is 64"),
    (InputConfig, dict(prompt_buckets=(64.5,)), "a length of prompt_buckets must be a whole number, but is 64.5"),
    (GenerationConfig, dict(sampling=0.7), "sampling must be a Sampling, but is 0.7"),
    (GenerationConfig, dict(seed=1.5), "seed must be a whole number, but is 1.5"),
    (Sampling, dict(temperature="0.5"), "temperature must be a number, but is '0.5'"),
    (Sampling, dict(top_p=True), "top_p must be a number, but is True"),
  ],
)
def test_configurations(kind, changes, message):
  """Their own checks; those of annotated types, which users do not have, are left out."""
  config = kind()
  for name, value in changes.items():
    object.__setattr__(config, name, value)
  with pytest.raises(UserError, match=re.escape(message)):
    config.__post_init__()


def test_numbers_of_schedules():
  _check_numbers(None, None)
  _check_numbers((2, -1), (0.5, 3, -1))
  with pytest.raises(UserError, match="keep must be a list of numbers, but is 0.5"):
    _check_numbers((2,), 0.5)
  with pytest.raises(UserError, match="a layer to prune before must be a whole number, but is 2.5"):
    _check_numbers((2.5,), None)
  for value in (True, "50%"):
    with pytest.raises(UserError, match="a count of image tokens to keep must be a whole number"):
      _check_numbers(None, (value,))


@pytest.mark.parametrize("dtype", ["int32", "no such", bool])
def test_dtypes(loaded, dtype):
  with pytest.raises(UserError, match="dtype must be bfloat16 or float32"):
    loaded("clip_mha").restore(dtype=dtype)
