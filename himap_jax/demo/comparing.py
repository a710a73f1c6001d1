"""One question answered without and with pruning: texts, times, costs, and what every layer sees of the picture."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from PIL import Image

from himap_jax import checkpoint
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.pool import Answered
from himap_jax.errors import UserError, check_text
from himap_jax.families.family import View
from himap_jax.inputs import Example
from himap_jax.pruning.config import PruningConfig
from himap_jax.pruning.cost import Costs, costs
from himap_jax.run.asking import Asked, Asker


class Side(NamedTuple):
  """An answer and what it took.

  Attributes:
    image_tokens: before the first layer, and after every stage.
    prefill_seconds: of a run for which nothing was compiled, like `decode_seconds`.
    compile_seconds: of the programs that were compiled before it.
  """

  text: str
  num_new_tokens: int
  image_tokens: tuple[int, ...]
  prefill_seconds: float
  decode_seconds: float
  compile_seconds: float
  costs: Costs


class Span(NamedTuple):
  """Layers `first` to `last` − 1, which see the same image tokens; none if pruning starts before the decoder."""

  first: int
  last: int
  num_image_tokens: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Both answers.

  Attributes:
    views: the picture as the model sees it; none if its image tokens form no grid.
    kept: for each stage the indices of the kept image tokens.
    ranks: for each stage their places in its ranking, 0 the best; None if it does not rank.
    spans: one more than there are stages.
  """

  plain: Side
  pruned: Side
  views: tuple[View, ...]
  kept: tuple[tuple[int, ...], ...]
  ranks: tuple[tuple[int, ...] | None, ...]
  spans: tuple[Span, ...]


def compare(asker: Asker, picture: Image.Image, question: str, pruning: PruningConfig) -> Comparison:
  """Answers a question twice.

  Raises:
    UserError: a question that is empty, not text or does not fit the model, or pruning that the model cannot run.
  """
  if not question.strip():
    raise UserError("the question is empty")
  check_text("the question", question)
  asked = [asker.prepare([picture], question, own) for own in (PruningConfig("none"), pruning)]
  (plain, _), (pruned, answered) = (_answer(asker, own) for own in asked)
  example = asked[1].example
  segments = asked[1].schedule.segments(asker.opened.config.text.num_hidden_layers, example.num_image_tokens)
  spans = tuple(Span(own.first, own.last, count) for own, count in zip(segments, pruned.image_tokens, strict=True))
  ranks = tuple(own if own is None else tuple(own) for own in answered.ranks)
  return Comparison(plain, pruned, _views(asker, example), tuple(map(tuple, answered.kept)), ranks, spans)


def _answer(asker: Asker, asked: Asked) -> tuple[Side, Answered]:
  """The side, and the engine's answer."""
  reply = asker.answer(asked)
  answered, example = reply.answered, asked.example
  if reply.compile_seconds:
    answered = asker.answer(asked).answered
  counts = tuple(map(len, answered.kept))
  side = Side(
    text=reply.text,
    num_new_tokens=len(answered.tokens),
    image_tokens=(example.num_image_tokens, *counts),
    prefill_seconds=answered.prefill_seconds,
    decode_seconds=answered.decode_seconds,
    compile_seconds=reply.compile_seconds,
    costs=costs(
      model_sizes(asker.opened.config, asker.processor.blank.images.pixels.shape[2:]),
      asked.schedule.with_counts(counts),
      example.num_image_tokens,
      example.num_text_tokens,
      jnp.dtype(checkpoint.DTYPES[asker.config.dtype]).itemsize,
      num_pictures=example.size.num_tiles,
    ),
  )
  return side, answered


def _views(asker: Asker, example: Example) -> tuple[View, ...]:
  try:
    return tuple(asker.processor.views(example))
  except UserError:
    return ()
