"""One question answered without and with pruning: texts, times, costs, and what every layer sees of the picture."""

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from himap_jax.engine.accounting import model_sizes
from himap_jax.errors import UserError
from himap_jax.families.family import View
from himap_jax.inputs import Example
from himap_jax.pruning.cost import Costs, costs
from himap_jax.pruning.methods import PruningConfig
from himap_jax.run import command, drawing
from himap_jax.run.asking import INCOMPLETE, Asked, Asker

SIDES = ("plain", "pruned")
# Takes a side, a name and its value, such as the text so far; what it raises ends the comparison.
Show = Callable[[str, str, Any], None]


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
    spans: one more than there are stages.
  """

  plain: Side
  pruned: Side
  views: tuple[View, ...]
  kept: tuple[tuple[int, ...], ...]
  spans: tuple[Span, ...]


def compare(
  asker: Asker, picture: Image.Image, question: str, pruning: PruningConfig, show: Show = lambda *_: None
) -> Comparison:
  """Answers a question twice.

  Raises:
    UserError: an empty question, one that does not fit the model, or pruning that the model cannot run.
  """
  if not question.strip():
    raise UserError("the question is empty")
  choices = dict(zip(SIDES, (PruningConfig("none"), pruning), strict=True))
  asked = {side: asker.prepare([picture], question, choice) for side, choice in choices.items()}
  found, kept = {}, ()
  for side in SIDES:
    found[side], kept = _answer(asker, asked[side], lambda name, value, side=side: show(side, name, value))
  example, schedule = asked["pruned"].example, asked["pruned"].schedule
  segments = schedule.segments(asker.opened.config.text.num_hidden_layers, example.num_image_tokens)
  counts = found["pruned"].image_tokens
  spans = tuple(Span(own.first, own.last, count) for own, count in zip(segments, counts, strict=True))
  return Comparison(found["plain"], found["pruned"], _views(asker, example), kept, spans)


def _answer(asker: Asker, asked: Asked, show: Callable[[str, Any], None]) -> tuple[Side, tuple[tuple[int, ...], ...]]:
  """The side, and what its stages kept."""

  def is_complete(tokens: Sequence[int]) -> bool:
    show("text", asker.processor.decode(list(tokens)).rstrip(INCOMPLETE))
    return False

  reply = asker.answer(asked, is_complete)
  answered = reply.answered
  if reply.compile_seconds:
    show("compiled", reply.compile_seconds)
    answered = asker.answer(asked).answered
  kept, example = tuple(map(tuple, reply.answered.kept)), asked.example
  counts = tuple(map(len, kept))
  side = Side(
    text=reply.text,
    num_new_tokens=len(reply.answered.tokens),
    image_tokens=(example.num_image_tokens, *counts),
    prefill_seconds=answered.prefill_seconds,
    decode_seconds=answered.decode_seconds,
    compile_seconds=reply.compile_seconds,
    costs=costs(
      model_sizes(asker.opened.config, asker.processor.blank.images.pixels.shape[2:]),
      asked.schedule.with_counts(counts),
      example.num_image_tokens,
      example.num_text_tokens,
      jnp.dtype(command.DTYPES[asker.config.dtype]).itemsize,
      num_pictures=example.size.num_tiles,
    ),
  )
  return side, kept


def _views(asker: Asker, example: Example) -> tuple[View, ...]:
  try:
    return tuple(asker.processor.views(example))
  except UserError:
    return ()


def described(comparison: Comparison) -> dict[str, Any]:
  """The comparison as JSON for the page; its pictures are `data:` URLs, overlays have one pixel per patch.

  For each span `veils` hide what is pruned before, and `tints` also colour the rest by the stages that it survives.
  """
  kept, num_stages = comparison.kept, len(comparison.kept)
  views = []
  for view in comparison.views:
    stages = drawing.survived(view, kept)
    veils = [drawing.veil((stages >= done) | (stages < 0)) for done in range(num_stages + 1)]
    tinted = drawing.tint(stages, num_stages)
    tints = [np.where(veil[..., 3:] > 0, veil, tinted) for veil in veils]
    overlays = {"veils": list(map(_url, veils)), "tints": list(map(_url, tints))}
    views.append({"picture": _url(view.picture), **overlays})
  return {
    **{side: _side(getattr(comparison, side)) for side in SIDES},
    "views": views,
    "spans": [span._asdict() for span in comparison.spans],
    "colours": ["#" + bytes(colour.tolist()).hex() for colour in drawing.colours(num_stages + 1)],
  }


def _side(side: Side) -> dict[str, Any]:
  values = side._asdict()
  own = values.pop("costs")
  return values | {"prefill_flops": own.prefill, "image_flops": own.image_tokens, "cache_bytes": own.cache_bytes}


def _url(picture: Image.Image | UInt8[np.ndarray, "rows columns 4"]) -> str:
  file = io.BytesIO()
  picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
  picture.save(file, format="PNG")
  return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
