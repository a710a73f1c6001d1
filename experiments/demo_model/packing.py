"""Packs images and their questions into training sequences.

Axes: B images, S slots, A answer tokens.

    slot      [ system, image ][ question 1, answer 1 ][ question 2, answer 2 ] … padding
    segment     0               1                       2                         UNUSED
    position    0 … P − 1       P, P + 1, …             P, P + 1, …               0

Where the text reads pictures by cross-attention, `<image>` is a text token before the image tokens, which have its
position.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from PIL import Image

from experiments.demo_model.data import Asked, Sample
from himap_jax.checkpoint import LoadedModel
from himap_jax.errors import UserError
from himap_jax.families.examples import positions_across
from himap_jax.inputs import IMAGE, PADDING, TEXT, Images, Inputs, Layout, pytree

UNUSED = -1
ANSWER_SLOTS_SHARE = 2  # at most one in two of the question slots holds an answer token


@pytree
class Batch:
  """Packed sequences."""

  inputs: Inputs
  segments: Int[Array, "B S"]  # 0 in the shared prefix, 1 … in the questions, `UNUSED` in padding
  answer_slots: Int[Array, "B A"]  # the slot before each answer token, whose logits predict it
  answers: Int[Array, "B A"]  # the answer tokens, including each answer's end
  answer_valid: Bool[Array, "B A"]  # False in padding
  answer_question: Int[Array, "B A"]  # index of the question that the token answers

  def mask(self) -> Bool[Array, "B 1 S S"]:
    """True where a slot may attend, apart from causality: to the prefix and to its own segment."""
    query, key = self.segments[:, :, None], self.segments[:, None, :]
    return ((key == 0) | (key == query))[:, None]


class Packer:
  """Packs to one static shape: pictures of `image_size` pixels, and `question_slots` slots for the questions of each.

  Attributes:
    grid: image tokens along a side.
  """

  def __init__(self, loaded: LoadedModel, image_size: int, question_slots: int):
    self._processor, self._image_token = loaded.processor, loaded.config.image_token_id
    self._image_size, self._question_slots = image_size, question_slots
    self._num_image_tokens = loaded.config.num_image_tokens(image_size, image_size)
    self._is_cross = bool(loaded.config.text.cross_attention_layers)
    self.grid = math.isqrt(self._num_image_tokens)
    self._tokenize = functools.cache(self._tokenize)

  def split(self, questions: Sequence[Asked]) -> list[list[Asked]]:
    """Splits questions into groups that fit; raises `UserError` if one alone does not."""
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
    """Packs one sequence per sample, with as many of its questions as fit; raises `UserError` if none does."""
    rows = [self._row(self.split(sample.questions)[0]) for sample in samples]
    tokens, image_id, positions, segments, *answers = map(np.stack, zip(*rows, strict=True))
    kind = np.where(image_id >= 0, IMAGE, np.where(segments == UNUSED, PADDING, TEXT))
    layout = Layout.of_rows(kind, image_id, self._num_image_tokens)
    images = Images(self.pixel_values([sample.picture for sample in samples])[:, None])
    inputs = Inputs(tokens, layout, positions, images)
    return jax.tree.map(jnp.asarray, Batch(inputs, segments, *answers))

  def pixel_values(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "B 3 h w"]:
    side = self._image_size
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return self._processor.image_processor(list(pictures), **sizes, return_tensors="np")["pixel_values"]

  def _row(self, questions: Sequence[Asked]) -> list[np.ndarray]:
    """Tokens, images, positions and segments of all slots; then slots, tokens, validity, questions of the answers."""
    system = self._tokenize(*questions[0])[0] + [self._image_token] * self._is_cross
    image_id = np.repeat(np.array([-1, 0], np.int32), [len(system), self._num_image_tokens])
    tokens, prefix = system + [self._image_token] * self._num_image_tokens, len(image_id)
    positions = list(positions_across(image_id)) if self._is_cross else list(range(prefix))
    first, segments, is_answer = positions[-1] + 1, [0] * prefix, [False] * prefix
    for index, asked in enumerate(questions, start=1):
      _, question, answer = self._tokenize(*asked)
      length = len(question) + len(answer)
      tokens += question + answer
      positions += range(first, first + length)
      segments += [index] * length
      is_answer += [False] * len(question) + [True] * len(answer)
    answers = np.flatnonzero(is_answer)
    num_slots, num_answers = prefix + self._question_slots, self._question_slots // ANSWER_SLOTS_SHARE
    return [
      _pad(tokens, num_slots),
      _pad(image_id, num_slots, -1),
      _pad(positions, num_slots),
      _pad(segments, num_slots, UNUSED),
      _pad(answers - 1, num_answers),
      _pad(np.take(tokens, answers), num_answers),
      np.arange(num_answers) < len(answers),
      _pad(np.take(segments, answers) - 1, num_answers),
    ]

  def _tokenize(self, question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
    """Tokens before the image, after it, and of the answer."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = self._processor.apply_chat_template([message], add_generation_prompt=True)
    tokenizer = self._processor.tokenizer
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    image = prompt.index(self._image_token)
    answer_tokens = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt[:image], prompt[image + 1 :], answer_tokens


def _pad(values: Sequence[int] | np.ndarray, length: int, fill: int = 0) -> np.ndarray:
  if len(values) > length:
    raise UserError(f"{len(values)} tokens do not fit into {length} slots")
  return np.pad(np.asarray(values, np.int32), (0, length - len(values)), constant_values=fill)
