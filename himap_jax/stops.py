"""Texts at which an answer stops."""

from collections.abc import Callable, Sequence

from himap_jax.families.family import Processor


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
  """The text up to the first of the texts that end it."""
  return text[: min((text.index(stop) for stop in stops if stop and stop in text), default=len(text))]


def stop_condition(processor: Processor, stops: Sequence[str]) -> Callable[[Sequence[int]], bool] | None:
  """Whether an answer has one of these texts, as `Request.is_complete`; None if there are none."""

  def is_complete(tokens: Sequence[int]) -> bool:
    text = processor.decode(list(tokens))
    return any(stop in text for stop in stops)

  stops = tuple(filter(None, stops))
  return is_complete if stops else None
