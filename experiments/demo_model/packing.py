"""Packs images and their questions into training sequences.

Axes: B images, S slots, A answer tokens.

    slot      [ system, image ][ question 1, answer 1 ][ question 2, answer 2 ] … padding
    segment     0               1                       2                         UNUSED
    position    0 … P − 1       P, P + 1, …             P, P + 1, …               0
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from experiments.demo_model.data import Sample
from himap_jax.errors import UserError
from himap_jax.inputs import IMAGE, PADDING, TEXT, Inputs, Layout, pytree
from himap_jax.model.config import ModelConfig

UNUSED = -1
ANSWER_SLOTS_SHARE = 2  # of the slots of questions and answers, at most one of two is an answer token


@pytree
class Batch:
  """Packed sequences.

  Attributes:
    segments: 0 in the shared prefix, 1 … in the questions, `UNUSED` in padding.
    answer_slots: the slots before each answer token, whose logits predict it.
    answers: the answer tokens, each answer's end included.
    answer_valid: false in padding.
    answer_question: which question of the image the token answers.
  """

  inputs: Inputs
  segments: Int[Array, "B S"]
  answer_slots: Int[Array, "B A"]
  answers: Int[Array, "B A"]
  answer_valid: Bool[Array, "B A"]
  answer_question: Int[Array, "B A"]

  def mask(self) -> Bool[Array, "B 1 S S"]:
    """True where a slot may attend beside what causality hides: to the prefix and to its own segment."""
    query, key = self.segments[:, :, None], self.segments[:, None, :]
    return ((key == 0) | (key == query))[:, None]


class Packer:
  """Packs to one static shape: a fixed number of slots for the questions of an image.

  Attributes:
    grid: image tokens along a side.
  """

  def __init__(self, processor: Any, config: ModelConfig, *, image_size: int, question_slots: int):
    """Takes the checkpoint's transformers processor, and the size in pixels of a picture's sides."""
    self._processor, self._image_token = processor, config.image_token_id
    self._image_size, self._question_slots = image_size, question_slots
    self._num_image_tokens = config.num_image_tokens(image_size, image_size)
    self.grid = math.isqrt(self._num_image_tokens)
    self._tokenize = functools.cache(self._tokenize)

  def split(self, questions: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Splits questions into groups that fit; raises `UserError` where one alone does not."""
    groups, used = [[]], 0
    for question in questions:
      length = sum(map(len, self._tokenize(*question)[1:]))
      if length > self._question_slots:
        raise UserError(f"a question and its answer take {length} tokens, more than {self._question_slots} slots")
      if used + length > self._question_slots:
        groups.append([])
        used = 0
      groups[-1].append(question)
      used += length
    return groups

  def pack(self, samples: Sequence[Sample]) -> Batch:
    """Packs one sequence a sample, with as many of its questions as fit; raises `UserError` where none does."""
    rows = [self._row(self.split(sample.questions)[0]) for sample in samples]
    fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    tokens, positions, segments = (fields.pop(name) for name in ("tokens", "positions", "segments"))
    is_image = tokens == self._image_token
    kind = np.where(is_image, IMAGE, np.where(segments == UNUSED, PADDING, TEXT))
    layout = Layout.of_rows(kind, np.where(is_image, 0, -1), self._num_image_tokens)
    inputs = Inputs(tokens, layout, positions, self.pixel_values([sample.picture for sample in samples]))
    return jax.tree.map(jnp.asarray, Batch(inputs, segments, **fields))

  def pixel_values(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "B 3 h w"]:
    """Preprocesses pictures."""
    side = self._image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return self._processor.image_processor(list(pictures), **sizes, return_tensors="np")["pixel_values"]

  def _row(self, questions: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    system = self._tokenize(*questions[0])[0]
    prefix = len(system) + self._num_image_tokens
    tokens = system + [self._image_token] * self._num_image_tokens
    positions, segments = list(range(prefix)), [0] * prefix
    answer_slots, answers, answer_question = [], [], []
    for index, asked in enumerate(questions):
      _, question, answer = self._tokenize(*asked)
      first = len(tokens) + len(question) - 1
      answer_slots += range(first, first + len(answer))
      answers += answer
      answer_question += [index] * len(answer)
      tokens += question + answer
      positions += range(prefix, prefix + len(question) + len(answer))
      segments += [index + 1] * (len(question) + len(answer))
    num_slots = prefix + self._question_slots
    num_answers = self._question_slots // ANSWER_SLOTS_SHARE
    return {
      "tokens": _pad(tokens, num_slots),
      "positions": _pad(positions, num_slots),
      "segments": _pad(segments, num_slots, UNUSED),
      "answer_slots": _pad(answer_slots, num_answers),
      "answers": _pad(answers, num_answers),
      "answer_valid": np.arange(num_answers) < len(answers),
      "answer_question": _pad(answer_question, num_answers),
    }

  def _tokenize(self, question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
    """Tokens before the image, after it, and of the answer."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = self._processor.apply_chat_template([message], add_generation_prompt=True)
    tokenizer = self._processor.tokenizer
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    image = prompt.index(self._image_token)
    answer_tokens = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt[:image], prompt[image + 1 :], answer_tokens


def _pad(values: list[int], length: int, fill: int = 0) -> np.ndarray:
  if len(values) > length:
    raise UserError(f"{len(values)} tokens do not fit into {length} slots")
  return np.array(values + [fill] * (length - len(values)), np.int32)
