"""Wrong arguments of the library: each is refused in one line that names it."""

import dataclasses
import re

import commands
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
    ([PICTURE], [[Message("robot", "Why?")]], "questions.0..0. has the role 'robot'; needed: system, user, assistant"),
    ([PICTURE], [[Message("user", None)]], "the text of questions.0..0. must be a text, but is None"),
    ([PICTURE], [[Message("user", "Why?"), Message("assistant", "So.")]], "the last message must be the user's"),
    (
      [PICTURE],
      [[Message("user", "Why?"), Message("system", "Be brief."), Message("user", "Why?")]],
      "questions.0.: only the first message may be the system's",
    ),
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


@pytest.mark.parametrize("stages", [[], (1,)])
def test_stages(stages):
  schedule = Schedule()
  object.__setattr__(schedule, "stages", stages)
  with pytest.raises(UserError, match="the stages of a schedule must be a tuple of Stage, not"):
    arguments.check_schedule(schedule)


@pytest.mark.parametrize(
  "method, layers, keep, options",
  [
    ("himap", (2, 3), (8, 4), {}),
    ("fastv", (1,), (8,), {}),
    ("shortv", (2,), None, {}),
    ("random", (0,), (8,), dict(restore=True)),
    ("random", (0,), (8,), dict(keep_positions=True)),
  ],
)
def test_schedules_of_another_model(loaded, method, layers, keep, options):
  model = loaded("clip_mha")
  schedule = model.schedule(method, layers, keep, **options)
  arguments.check_fits(schedule, model.config)
  text = dataclasses.replace(model.config.text, cross_attention_layers=(1, 3))
  across = dataclasses.replace(model.config, text=text)
  with pytest.raises(UserError, match="the schedule was made for another model, which has what this one lacks"):
    arguments.check_fits(schedule, across)
  arguments.check_fits(model.schedule("fastv", (2,), (8,)), across)
  arguments.check_fits(model.schedule("random", (1,), (8,)), across)


def test_shares_of_any_type():
  keep = arguments.with_shares([np.float32(0.25), 1, 1.0, np.int64(3), True, "1"])
  assert keep == (0.25, 1, 1.0, 3, True, "1") and list(map(type, keep[:3])) == [float, int, float]
  assert arguments.with_shares(None) is None


WRONG = {
  "load(None, dtype='float32')": "name must be the name or the directory of a checkpoint, but is None",
  "load(b'x', dtype='float32')": "name must be the name or the directory of a checkpoint, but is b'x'",
  "load('x', dtype='float32', cache_dir=5)": "cache_dir must be a directory, but is 5",
  "load('x', dtype='float32', allow_pickle='no')": "allow_pickle must be True or False, but is 'no'",
  "loaded.schedule('himap', restore='yes')": "restore must be True or False, but is 'yes'",
  "loaded.schedule('himap', keep_positions=1)": "keep_positions must be True or False, but is 1",
  "loaded.schedule('himap', parameters=[1])": "parameters must be a dictionary of numbers by name, but is [1]",
  "generate('x', [], [])": "loaded must be what himap_jax.load returns, but is 'x'",
  "generate(None, [], [])": "loaded must be what himap_jax.load returns, but is None",
  "generate(loaded, [], [], generation=None)": "generation must be a GenerationConfig, but is None",
  "generate(loaded, [], [], generation={})": "generation must be a GenerationConfig, but is {}",
  "generate(loaded, [], [], inputs=None)": "inputs must be an InputConfig, but is None",
  "generate(loaded, [], [], inputs='chat')": "inputs must be an InputConfig, but is 'chat'",
}


def test_arguments_of_other_types(checkpoints, tmp_path):
  """In a process of its own, in which annotations are not checked, as in those of users."""
  code = """
import sys
from himap_jax import UserError, generate, load
loaded = load(sys.argv[1], dtype="float32", cache_dir=sys.argv[2])
for wrong in sys.argv[3:]:
  try:
    eval(wrong)
  except UserError as error:
    print(error)
"""
  found = commands.Command(code, checkpoints("clip_mha").directory, tmp_path, *WRONG).succeeded()
  assert found.splitlines() == list(WRONG.values())


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
    (GenerationConfig, dict(ignore_eos="no"), "ignore_eos must be True or False, but is 'no'"),
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


@pytest.mark.parametrize("dtype", [None, float, "float64", "float16", "float8_e4m3fn", ">f4", "int32", "no such", bool])
def test_dtypes(loaded, dtype):
  with pytest.raises(UserError, match="dtype must be bfloat16 or float32"):
    loaded("clip_mha").restore(dtype=dtype)
