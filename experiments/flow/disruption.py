"""Does the answer change when visual information cannot flow in some layer? (HiMAP, sections 3.2 and 3.3)

    python -m experiments.flow.disruption --flagfile=experiments/flags/disruption.flags

Removes the flow from image to instruction, or within the image, from one layer or from that layer and all later ones.
Controls: as many random pairs, random pairs of the same probability, the flow from the image to as many random tokens,
and the flow replaced by its mean over the other questions. Where text reads the image by cross-attention, nothing flows
within the image, and layers are cross layers.

Axes: C cells, D disruptions, L layers, B batch, A aligned tokens, Q questions, V vocabulary, N query heads, H head dim.
"""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Float, Int, Shaped
from matplotlib.figure import Figure

from experiments.flow import interventions, tokens
from experiments.flow.interventions import BLOCKS, CHOSEN, HOW, Intervention
from experiments.question_sets import Question
from experiments.shared import figures, kept, statistics, study, tabular
from experiments.shared.subject import Batch, Subject
from himap_jax.engine.engine import row_seeds
from himap_jax.errors import UserError
from himap_jax.run import flag_values

MODES = ("single", "onward")  # one layer (the paper); that layer and all later ones (the authors' code)
TOP = 5
COLOURS = {BLOCKS[0]: "#d1221b", BLOCKS[1]: "#2f8fe0"}
LINES = {"block": "-", "random": "--", "mass": ":", "rows": "-."}

# The effect of a disruption on the first answer token: whether the most likely token is the same, |A ∩ B| / |A ∪ B| of
# the five most likely tokens with and without disruption, and the Kullback–Leibler divergence from the undisturbed
# distribution.
MEASURES = {"is_same": "label consistency", "overlap": "score consistency", "divergence": "divergence, nats"}
Outcome = dict[str, Shaped[np.ndarray, "D Q"]]  # by measure


@dataclasses.dataclass(frozen=True)
class Disruption:
  """An intervention in one layer (mode `single`), or in that layer and all later ones (`onward`)."""

  intervention: Intervention
  mode: str
  layer: int

  def active(self, num_layers: int) -> Bool[np.ndarray, "L"]:
    numbers = np.arange(num_layers)
    return numbers == self.layer if self.mode == "single" else numbers >= self.layer


class Sums(NamedTuple):
  """Sums over all questions: of `interventions.flows`, and the number of questions with each aligned token."""

  flows: Float[np.ndarray, "L A N H"]
  count: Int[np.ndarray, "A"]


def measure(
  subject: Subject, disruptions: Sequence[Disruption], workdir: pathlib.Path
) -> tuple[list[Question], Outcome]:
  """The subject's questions and the effect of every disruption on each, kept in `workdir`."""
  sums = None
  if any(disruption.intervention.how == "mean" for disruption in disruptions):
    sums = Sums(**kept.arrays_of(workdir / "sums.npz", lambda: _sums(subject)._asdict()))
  return subject.measure(workdir / "outcome", lambda batch: outcome_of(subject, batch, disruptions, sums), axis=1)


def outcome_of(subject: Subject, batch: Batch, disruptions: Sequence[Disruption], sums: Sums | None) -> Outcome:
  """The effect of every disruption on a batch; `sums` are needed for interventions by the mean."""
  model, seeds = subject.loaded.model, row_seeds(subject.seed, batch.row_ids)
  plain, means = interventions.undisturbed(model, batch.inputs), None
  if sums is not None:
    means = jax.device_put(mean_of_others(sums, *map(np.asarray, interventions.flows(model, plain))))
  outcomes = []
  for disruption in disruptions:
    intervention, active = disruption.intervention, disruption.active(subject.num_layers)
    used = means if intervention.how == "mean" else None
    logits = interventions.disrupted_logits(model, plain, intervention, active, used, seeds)
    outcomes.append(compare(np.asarray(plain.logits), np.asarray(logits)))
  return {name: np.stack([outcome[name] for outcome in outcomes]) for name in MEASURES}


def _sums(subject: Subject) -> Sums:
  model, by_size = subject.loaded.model, {}  # buckets differ in their number of aligned tokens
  for batch in subject.batches("flows"):
    own, present = interventions.flows(model, interventions.undisturbed(model, batch.inputs))
    rows = len(batch.questions)
    part = Sums(np.asarray(own[:, :rows]).sum(axis=1), np.asarray(present)[:rows].sum(axis=0))
    by_size[len(part.count)] = Sums(*map(np.add, by_size.get(len(part.count), (0, 0)), part))

  def padded(size: int) -> Sums:
    missing = (0, max(by_size) - size)
    return Sums(np.pad(by_size[size].flows, ((0, 0), missing, (0, 0), (0, 0))), np.pad(by_size[size].count, missing))

  return Sums(*map(sum, zip(*map(padded, by_size), strict=True)))


def mean_of_others(
  sums: Sums, own: Float[np.ndarray, "L B A N H"], present: Bool[np.ndarray, "B A"]
) -> Float[np.ndarray, "L B A N H"]:
  """For each row, the mean flow over all other questions, 0 where there is none; `sums` includes the row."""
  size = present.shape[1]
  count = (sums.count[:size] - present)[None, :, :, None, None]
  others = sums.flows[:, None, :size] - own
  return np.where(count > 0, others / np.maximum(count, 1), 0).astype(np.float32)


def compare(plain: Float[np.ndarray, "Q V"], disrupted: Float[np.ndarray, "Q V"]) -> Outcome:
  """Effect of one disruption on the next-token distribution; the result has no D axis."""
  shifted = [logits.astype(np.float64) - logits.max(axis=1, keepdims=True) for logits in (plain, disrupted)]
  log_p, log_q = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) for logits in shifted)
  top = [np.argsort(-logits, axis=1, kind="stable")[:, :TOP] for logits in (plain, disrupted)]
  common = np.array([len(set(a) & set(b)) for a, b in zip(*top, strict=True)])
  return {
    "is_same": top[0][:, 0] == top[1][:, 0],
    "overlap": common / (2 * TOP - common),
    "divergence": (np.exp(log_p) * (log_p - log_q)).sum(axis=1),
  }


def bias_ratio(into_image: Float[np.ndarray, "*C"], into_instruction: Float[np.ndarray, "*C"], count: int) -> Any:
  """D = log(E_vv / E_vt) (Eq. 7), with E = 1 − the mean overlap of the five most likely tokens.

  The overlaps are means over `count` questions with the flow into the image or into the instruction disrupted. Half a
  changed token in one question is added to both E to keep the logarithm finite.
  """
  least = 0.5 * (1 - (TOP - 1) / (TOP + 1)) / count
  return np.log((1 - into_image + least) / (1 - into_instruction + least))


def consistency_rows(outcome: Outcome, disruptions: Sequence[Disruption], *, seed: int) -> list[tabular.Row]:
  rows = zip(disruptions, statistics.mean_rows(outcome, seed=seed), strict=True)
  return [{"intervention": d.intervention.name, "mode": d.mode, "layer": d.layer} | row for d, row in rows]


def bias_rows(outcome: Outcome, disruptions: Sequence[Disruption], *, seed: int) -> list[tabular.Row]:
  count, means = outcome["overlap"].shape[1], outcome["overlap"].mean(axis=1)
  resampled, result = statistics.resample(outcome["overlap"], seed=seed), []
  numbers = {disruption: number for number, disruption in enumerate(disruptions)}
  for disruption, number in numbers.items():
    intervention = disruption.intervention
    pair = dataclasses.replace(disruption, intervention=dataclasses.replace(intervention, block=BLOCKS[1]))
    if intervention.block == BLOCKS[0] and pair in numbers:
      into_image = numbers[pair]
      row = {"chosen": intervention.chosen, "how": intervention.how, "mode": pair.mode, "layer": pair.layer}
      bias = bias_ratio(means[into_image], means[number], count)
      ends = statistics.interval(bias_ratio(resampled[:, into_image], resampled[:, number], count))
      result.append(row | dict(zip(("bias", "low", "high"), map(float, (bias, *ends)), strict=True)))
  return result


def summary(measured: Sequence[tabular.Row], bias: Sequence[tabular.Row] | None) -> list[str]:
  """The tables of a report; `bias` is None where nothing flows within the image."""
  same, overlap = (tabular.with_interval(name, ".0%", "{} ({}–{})") for name in ("is_same", "overlap"))
  lines = ["## Label consistency: how often the most likely first token stays the same", ""]
  lines += [*_by_layer(measured, ("intervention", "mode"), same), ""]
  lines += ["## Score consistency: overlap of the five most likely tokens", ""]
  lines += [*_by_layer(measured, ("intervention", "mode"), overlap), ""]
  if bias is None:
    text = (
      "No layer changes image tokens, so nothing flows within the image and there is no bias ratio. A token from which "
    )
    return [*lines, text + "the whole image is hidden receives nothing: for the block, `mask` is `zero`."]
  lines += ["## Bias ratio D = log(E_vv / E_vt)", ""]
  return [*lines, *_by_layer(bias, ("chosen", "how", "mode"), "{bias:.2f} ({low:.2f} to {high:.2f})")]


def _by_layer(rows: Sequence[tabular.Row], names: Sequence[str], form: str) -> list[str]:
  layers = list(dict.fromkeys(str(row["layer"]) for row in rows))
  lines: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
  for row in rows:
    lines[tuple(row[name] for name in names)].append(form.format_map(row))
  return tabular.markdown([*names, *layers], ([*key, *cells] for key, cells in lines.items()))


def plot_consistency(rows: Sequence[tabular.Row], made: Sequence[Intervention]) -> Figure:
  """Plots every measure by layer: colour for the block, line style for the pairs, panels for `how` and mode."""
  ways = list(itertools.product(dict.fromkeys(intervention.how for intervention in made), MODES))
  figure = Figure(figsize=(12, 3.1 * len(ways)), layout="constrained")
  panels = figure.subplots(len(ways), len(MEASURES), squeeze=False, sharex=True)
  for panel_row, (how, mode) in zip(panels, ways, strict=True):
    for axes, (measure, label) in zip(panel_row, MEASURES.items(), strict=True):
      for one in (intervention for intervention in made if intervention.how == how):
        series = [row for row in rows if (row["intervention"], row["mode"]) == (one.name, mode)]
        style = {"marker": ".", "linewidth": 1.3, "color": COLOURS[one.block], "label": one.name.rpartition(", ")[0]}
        figures.line_with_interval(axes, series, "layer", statistics.names(measure), LINES[one.chosen], **style)
      axes.set_title(f"{how}, {mode}", fontsize=9)
      figures.finish(axes, ylabel=label)
    panel_row[0].legend(fontsize=7)
  for axes in panels[-1]:
    axes.set_xlabel("layer")
  return figure


def plot_bias(rows: Sequence[tabular.Row]) -> Figure:
  figure = Figure(figsize=(11, 3.8), layout="constrained")
  for axes, mode in zip(figure.subplots(1, len(MODES), sharey=True), MODES, strict=True):
    for chosen, how in dict.fromkeys((row["chosen"], row["how"]) for row in rows):
      series = [row for row in rows if (row["chosen"], row["how"], row["mode"]) == (chosen, how, mode)]
      figures.line_with_interval(axes, series, "layer", ("bias", "low", "high"), marker=".", label=f"{chosen}, {how}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(f"{mode}; above 0 image→image matters more", fontsize=9)
    figures.finish(axes, legend=7, xlabel="layer")
  return figure


def define_flags() -> None:
  for name, known in (("how", HOW), ("chosen", CHOSEN)):
    flags.DEFINE_list(name, list(known), "; ".join(f"{value}: {meaning}" for value, meaning in known.items()))
  flags.DEFINE_list("layers", None, "Layers to disrupt, of those in which the image is read; all by default.")


def run(values: Any) -> study.Report:
  hows, pairs = flag_values.chosen(values["how"], HOW), flag_values.chosen(values["chosen"], CHOSEN)
  every = (Intervention(block, chosen, how) for how in hows for chosen in pairs for block in BLOCKS)
  made = [intervention for intervention in every if intervention.is_defined]
  if not made:
    raise UserError("--how=mean needs --chosen=block: other pairs have no mean")
  subject = study.load_subject(needs_sequence=False)
  layers = study.layers(values["layers"], subject)
  text = subject.opened.config.text
  made = [intervention for intervention in made if tokens.layers_of(text, intervention.block)]
  disruptions = [Disruption(*each) for each in itertools.product(made, MODES, layers)]
  questions, outcome = measure(subject, disruptions, study.workdir_for(subject, "how", "chosen", "layers"))
  rows = consistency_rows(outcome, disruptions, seed=subject.seed)
  tables, plots, bias = {"disruption": rows}, {"disruption": plot_consistency(rows, made)}, None
  if tokens.layers_of(text, BLOCKS[1]):
    bias = bias_rows(outcome, disruptions, seed=subject.seed)
    tables["bias"], plots["bias"] = bias, plot_bias(bias)
  return study.Report(f"{len(questions)} questions", summary(rows, bias), tables, plots)


if __name__ == "__main__":
  study.start("flow.disruption", define_flags, run)
