"""Schedules that show the decoder a given number of image tokens on average, layer by layer."""

from collections.abc import Sequence

import numpy as np

from himap_jax import methods
from himap_jax.schedule import Schedule


def schedule_for_budget(
  method: str,
  budget: float,
  *,
  num_layers: int,
  num_image_tokens: int,
  has_class_token: bool = True,
  prune_layers: tuple[int, ...] | None = None,
  ranking: Sequence[int] | None = None,
) -> Schedule:
  """Builds a method's schedule for an average number of image tokens.

  A method that prunes keeps its own shares times a common factor, at most all tokens and at least one, such that the image
  tokens that enter a layer are as near to the budget as can be on average. Of two methods both are scaled. A method that
  freezes instead updates that many image tokens in a layer on average.

  Args:
    method: as `methods.build_schedule` takes it.
    budget: image tokens a layer.
    num_layers: the decoder's layers.
    num_image_tokens: image tokens before pruning, N.
    has_class_token: whether the tower has a class token.
    prune_layers: the layers to prune before; the method's own when None.
    ranking: layers from least to most useful, for a method that freezes.

  Raises:
    ValueError: a budget that the method cannot come down to, or a method that cannot be run.
  """
  if not 0 < budget <= num_image_tokens:
    raise ValueError(f"a budget must be above 0 and at most the image's {num_image_tokens} tokens, not {budget:g}")
  sizes = {"num_layers": num_layers, "num_image_tokens": num_image_tokens, "has_class_token": has_class_token}
  names = methods.parse(method)
  if any(methods.METHODS[name].freezes for name in names):
    if prune_layers is not None:
      raise ValueError(f"for a budget, {method!r} takes its layers from their ranking, not from its name")
    frozen = frozen_for_budget(budget, ranking, num_layers=num_layers, num_image_tokens=num_image_tokens)
    return methods.build_schedule(method, **sizes, prune_layers=frozen)
  own = methods.build_schedule(method, **sizes, prune_layers=prune_layers)
  if not own.stages:
    raise ValueError(f"method {method!r} has nothing to scale to a budget")
  layers = tuple(stage.layer for stage in own.stages)
  keep = scale([stage.keep for stage in own.stages], layers, budget, num_layers, num_image_tokens)
  return methods.build_schedule(method, **sizes, prune_layers=layers, keep=keep)


def frozen_for_budget(
  budget: float, ranking: Sequence[int] | None, *, num_layers: int, num_image_tokens: int
) -> tuple[int, ...]:
  """The least useful layers that, frozen, bring the average of updated image tokens nearest to the budget."""
  if ranking is None:
    raise ValueError("a budget of a method that freezes layers needs their ranking: --shortv_ranking")
  lowest = num_image_tokens * (num_layers - len(ranking)) / num_layers
  if lowest > budget:
    raise ValueError(f"the ranking names {len(ranking)} layers; the lowest mean that they reach is {lowest:.1f} tokens")
  return tuple(ranking[: round(num_layers * (1 - budget / num_image_tokens))])


def scale(
  keep: Sequence[int], layers: Sequence[int], budget: float, num_layers: int, num_image_tokens: int
) -> tuple[int, ...]:
  """Scales non-increasing keep counts to a mean: by a factor, then the last count alone.

  Raises:
    ValueError: keeping one token at every stage still leaves more.
  """
  spans = np.diff([0, *layers, num_layers])

  def counts(factor: float) -> np.ndarray:
    return np.clip(np.rint(factor * np.asarray(keep)), 1, num_image_tokens).astype(int)

  def mean(kept: np.ndarray) -> float:
    return float(spans @ [num_image_tokens, *kept]) / num_layers

  if mean(counts(0.0)) > budget:
    raise ValueError(f"the lowest mean reachable is {mean(counts(0.0)):.1f} tokens")
  low, high = 0.0, num_image_tokens / min(keep)
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if mean(counts(middle)) <= budget else (low, middle)
  candidates = [_adjust_last(counts(factor), spans, budget, num_image_tokens) for factor in (low, high)]
  return tuple(min(candidates, key=lambda kept: abs(mean(kept) - budget)).tolist())


def _adjust_last(kept: np.ndarray, spans: np.ndarray, budget: float, num_image_tokens: int) -> np.ndarray:
  """The last count that brings the mean nearest to the budget with the others as they are."""
  entering = [num_image_tokens, *kept[:-1]]
  wanted = (budget * spans.sum() - spans[:-1] @ entering) / spans[-1]
  return np.append(kept[:-1], int(np.clip(round(wanted), 1, entering[-1])))
