"""What fixed rungs and thresholds come to, with intervals.

Axes: R rungs, Q questions, W resamples.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from experiments import statistics, tabular
from experiments.adaptive.study import Outcomes
from himap_jax.adaptive import Ladder, assign

MEASURES = {"right": "accuracy", "same": "agreement"}
Row = dict[str, Any]


def rows(outcomes: Outcomes, ladders: Sequence[Ladder], *, seed: int) -> tuple[list[Row], list[Row]]:
  """A row for every rung and no pruning, and one for every threshold.

  The adaptive rows have their difference to fixed HiMAP at the same FLOPs: to the line between the two rungs, or the last and no
  pruning, on either side of its price. That line is what dealing questions to rungs at random would come to.
  """
  names = ["/".join(map(str, keep)) for keep in outcomes.keep] + ["no pruning"]
  numbers = np.arange(outcomes.price.shape[1])
  assigned = [np.asarray(assign(jnp.asarray(outcomes.mass.T), ladder.threshold)) for ladder in ladders]

  def both(values: Float[np.ndarray, "P Q"]) -> Float[np.ndarray, "C Q"]:
    return np.concatenate([values, [values[rungs, numbers] for rungs in assigned]])

  values = {name: both(getattr(outcomes, name)) for name in ("price", *MEASURES)}
  means = {name: own.mean(axis=1) for name, own in values.items()}
  resampled = {name: statistics.resample(own, seed=seed) for name, own in values.items()}  # the same questions for all
  table: list[Row] = []
  for index in range(len(names) + len(ladders)):
    row: Row = {"keep": names[index]} if index < len(names) else _thresholds(ladders, assigned, index - len(names))
    row["flops"] = float(means["price"][index])
    for name, label in MEASURES.items():
      row |= statistics.with_interval(label, means[name][index], resampled[name][:, index])
    if index >= len(names):
      for name, label in MEASURES.items():
        fixed = _line(means["price"][None], means[name][None], index, len(names))[0]
        line = _line(resampled["price"], resampled[name], index, len(names))
        row |= statistics.with_interval(
          f"{label}_beyond_fixed", means[name][index] - fixed, resampled[name][:, index] - line
        )
    table.append(row)
  for row, mass, same in zip(table, outcomes.mass, outcomes.same, strict=False):  # of the rungs
    row |= {"mass": float(mass.mean()), "mass_spread": float(mass.std()), "mass_tells": _tells(mass, same == 1)}
  return table[: len(names)], table[len(names) :]


def _tells(mass: Float[np.ndarray, "Q"], stays: Bool[np.ndarray, "Q"]) -> float | None:
  """How often a question whose answer stays has more mass than one whose does not (the area under the ROC curve)."""
  if stays.all() or not stays.any():
    return None
  higher = np.sign(mass[stays][:, None] - mass[~stays][None])
  return float((higher.mean() + 1) / 2)


def _thresholds(ladders: Sequence[Ladder], assigned: Sequence[np.ndarray], number: int) -> Row:
  counts = np.bincount(assigned[number], minlength=len(ladders[number].rungs))
  return {"threshold": ladders[number].threshold, "rungs": "/".join(map(str, counts))}


def _line(
  prices: Float[np.ndarray, "W C"], values: Float[np.ndarray, "W C"], index: int, num_fixed: int
) -> Float[np.ndarray, "W"]:
  """Fixed schedules' values at the price of column `index`."""
  return np.array(
    [np.interp(price[index], price[:num_fixed], value[:num_fixed]) for price, value in zip(prices, values, strict=True)]
  )


def cheapest(outcomes: Outcomes) -> float:
  """The mean price where every question goes to the cheapest rung with the answer of no pruning, which nothing can know."""
  return float(np.take_along_axis(outcomes.price, (outcomes.same == 1).argmax(axis=0)[None], axis=0).mean())


def write_markdown(
  path: pathlib.Path, fixed: Sequence[Row], adapted: Sequence[Row], heading: str, cheapest: float
) -> None:
  """Writes both tables."""
  measures = list(MEASURES.values())
  lines = [heading, "", "## Fixed", ""]
  lines += tabular.markdown(
    ("keeps", "FLOPs, all tokens", *measures, "attention held", "held more where the answer stays"),
    (
      [
        row["keep"],
        f"{row['flops']:.1%}",
        *(tabular.with_interval(row, name, ".1%") for name in measures),
        f"{row['mass']:.1%} ± {row['mass_spread']:.1%}" if "mass" in row else "–",
        f"{row['mass_tells']:.0%} of pairs" if row.get("mass_tells") is not None else "–",
      ]
      for row in fixed
    ),
  )
  lines += ["", "## Adaptive", ""]
  lines += tabular.markdown(
    ("threshold", "questions by rung", "FLOPs, all tokens", *measures, *(f"{name} beyond fixed" for name in measures)),
    (
      [
        f"{row['threshold']:g}",
        row["rungs"],
        f"{row['flops']:.1%}",
        *(tabular.with_interval(row, name, ".1%") for name in measures),
        *(tabular.with_interval(row, f"{name}_beyond_fixed", "+.1%") for name in measures),
      ]
      for row in adapted
    ),
  )
  lines += [
    "",
    f"With every question on the cheapest rung that answers as no pruning does, FLOPs would be {cheapest:.1%}.",
  ]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
