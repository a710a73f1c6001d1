"""From outcomes to consistencies and bias ratios by layer, with bootstrap intervals over questions.

Axes: I interventions and modes, L layers, Q questions.
"""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import statistics, tabular
from experiments.disruption.interventions import BLOCKS, Intervention
from experiments.disruption.study import MODES, TOP, Outcome

Row = dict[str, Any]


def bias_ratio(into_image: Float[np.ndarray, "*C"], into_instruction: Float[np.ndarray, "*C"], count: int) -> Any:
  """D = log(E_vv / E_vt) (Eq. 7), with E = 1 − the mean overlap of the five likeliest tokens.

  Both have half a changed token in one question added, so that what changes nothing has a logarithm.

  Args:
    into_image: mean overlaps when the flow from image to image is disrupted.
    into_instruction: when that from image to instruction is.
    count: questions.
  """
  least = 0.5 * (1 - (TOP - 1) / (TOP + 1)) / count
  return np.log((1 - into_image + least) / (1 - into_instruction + least))


def rows(outcome: Outcome, interventions: Sequence[Intervention], layers: Sequence[int], *, seed: int) -> list[Row]:
  """A row for every intervention, mode and layer."""
  result = []
  for number, (intervention, mode) in enumerate(itertools.product(interventions, MODES)):
    columns: Row = {}
    for name in Outcome._fields:
      values = getattr(outcome, name)[number].astype(np.float64)
      low, high = statistics.interval(statistics.resample(values, seed=seed))
      columns |= {name: values.mean(axis=1), f"{name}_low": low, f"{name}_high": high}
    for index, layer in enumerate(layers):
      place = {"intervention": intervention.name, "mode": mode, "layer": layer}
      result.append(place | {name: float(values[index]) for name, values in columns.items()})
  return result


def bias_rows(
  outcome: Outcome, interventions: Sequence[Intervention], layers: Sequence[int], *, seed: int
) -> list[Row]:
  """The bias ratio for every way in which both blocks were disrupted, mode and layer."""
  count = outcome.overlap.shape[2]
  places = {(i.block, i.chosen, i.how): number for number, i in enumerate(interventions)}
  result = []
  for chosen, how in dict.fromkeys((i.chosen, i.how) for i in interventions):
    pair = [places.get((block, chosen, how)) for block in reversed(BLOCKS)]
    if None in pair:
      continue
    for offset, mode in enumerate(MODES):
      overlaps = [outcome.overlap[len(MODES) * number + offset] for number in pair]
      ratios = bias_ratio(*(values.mean(axis=1) for values in overlaps), count)
      resampled = (statistics.resample(values, seed=seed) for values in overlaps)
      bounds = statistics.interval(bias_ratio(*resampled, count))
      for layer, ratio, low, high in zip(layers, ratios, *bounds, strict=True):
        place = {"chosen": chosen, "how": how, "mode": mode, "layer": layer}
        result.append(place | {"bias": float(ratio), "low": float(low), "high": float(high)})
  return result


def write_markdown(path: pathlib.Path, measured: Sequence[Row], bias: Sequence[Row], heading: str) -> None:
  """Writes label and score consistency of every intervention, and bias ratios, over layers."""
  layers = list(dict.fromkeys(row["layer"] for row in measured))

  def grid(chosen: Sequence[Row], names: Sequence[str], cell: Callable[[Row], str]) -> list[str]:
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in chosen:
      lines.setdefault(tuple(row[name] for name in names), []).append(cell(row))
    return tabular.markdown([*names, *map(str, layers)], ([*key, *cells] for key, cells in lines.items()))

  def span(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.0%} ({row[f'{name}_low']:.0%}–{row[f'{name}_high']:.0%})"

  content = [
    heading,
    "",
    "## Label consistency: how often the likeliest first token stays",
    "",
    *grid(measured, ("intervention", "mode"), span("is_same")),
    "",
    "## Score consistency: overlap of the five likeliest",
    "",
    *grid(measured, ("intervention", "mode"), span("overlap")),
    "",
    "## Bias ratio D = log(E_vv / E_vt)",
    "",
    *grid(bias, ("chosen", "how", "mode"), lambda row: f"{row['bias']:.2f} ({row['low']:.2f} to {row['high']:.2f})"),
  ]
  path.write_text("\n".join(content) + "\n", encoding="utf-8")
