"""Disrupts every layer in every way, question by question, and goes on from what a work directory holds.

Axes: I interventions and modes, L layers of the study, B batch, Q questions, V vocabulary.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from experiments import kept
from experiments.disruption.interventions import (
  Intervention,
  Means,
  disrupted_logits,
  flows,
  instruction_rows,
  undisturbed,
)
from experiments.flow.subject import Batch, Subject
from experiments.question_sets import Question
from himap_jax.generation import row_seeds

MODES = ("single", "onward")  # one layer, as the paper says; it and all after it, as the authors' code does
TOP = 5


class Outcome(NamedTuple):
  """What a disruption did to the first answer token, for every intervention and mode, layer and question.

  Attributes:
    is_same: whether the likeliest token is the same.
    overlap: |A ∩ B| / |A ∪ B| of the five likeliest tokens without and with it.
    divergence: Kullback–Leibler, in nats, from the undisturbed distribution.
  """

  is_same: Bool[np.ndarray, "I L Q"]
  overlap: Float[np.ndarray, "I L Q"]
  divergence: Float[np.ndarray, "I L Q"]


def run(
  studied: Subject, interventions: Sequence[Intervention], layers: Sequence[int], workdir: pathlib.Path
) -> tuple[list[Question], Outcome]:
  """The outcome of all questions, in the order of their batches; interventions × modes in that order.

  Args:
    studied: model and questions.
    interventions: what is done.
    layers: where; in the mode `onward`, from where on.
    workdir: a file for every batch, and one for the means.
  """
  means = None
  if any(one.how == "mean" for one in interventions):
    means = Means(**kept.arrays_of(workdir / "means.npz", lambda: _means(studied)._asdict()))
  questions, outcomes = [], []
  for batch in studied.batches("disrupting"):
    path = workdir / f"outcome-{batch.number:05d}.npz"
    arrays = kept.arrays_of(path, lambda batch=batch: _measure(studied, batch, interventions, layers, means)._asdict())
    outcomes.append(Outcome(**arrays))
    questions += batch.questions
  return questions, Outcome(*(np.concatenate(parts, axis=2) for parts in zip(*outcomes, strict=True)))


@functools.partial(jax.jit, static_argnames="model")
def _undisturbed(model: Any, params: Any, inputs: Any) -> Any:
  embedded = model.bind({"params": params}).embed(inputs)
  return embedded, *undisturbed(model, params, embedded)


@functools.partial(jax.jit, static_argnames="model")
def _flows(model: Any, params: Any, embedded: Any, hidden: Any) -> tuple[Means, Int[Any, "E"]]:
  return flows(model, params, embedded, hidden), instruction_rows(embedded[1], hidden.shape[2])


def _means(studied: Subject) -> Means:
  """The means over all questions."""
  sums, counts, rows = {}, {}, 0
  for batch in studied.batches("means"):
    inputs = jax.tree.map(lambda x, batch=batch: jnp.asarray(x[: len(batch.questions)]), batch.inputs)
    embedded, hidden, _ = _undisturbed(studied.model, studied.loaded.params, inputs)
    part, count = _flows(studied.model, studied.loaded.params, embedded, hidden)
    rows += len(batch.questions)
    place = len(count)  # buckets differ in how many places there are
    sums[place] = jax.tree.map(np.add, sums[place], part) if place in sums else jax.tree.map(np.asarray, part)
    counts[place] = counts.get(place, 0) + np.asarray(count)
  longest = max(sums)
  into_instruction = sum(
    np.pad(part.into_instruction, ((0, 0), (0, longest - place), (0, 0), (0, 0))) for place, part in sums.items()
  )
  count = sum(np.pad(count, (0, longest - place)) for place, count in counts.items())
  into_image = sum(part.into_image for part in sums.values())
  return Means(
    into_instruction=(into_instruction / np.maximum(count, 1)[None, :, None, None]).astype(np.float32),
    into_image=(into_image / rows).astype(np.float32),
  )


def _measure(
  studied: Subject,
  batch: Batch,
  interventions: Sequence[Intervention],
  layers: Sequence[int],
  means: Means | None,
) -> Outcome:
  """The outcome of a batch's real rows."""
  inputs = jax.tree.map(jnp.asarray, batch.inputs)
  embedded, hidden, plain = _undisturbed(studied.model, studied.loaded.params, inputs)
  seeds = jnp.asarray(row_seeds(studied.seed, batch.row_ids))
  count, numbers = len(batch.questions), jnp.arange(studied.num_layers, dtype=jnp.int32)
  outcomes = []
  for intervention in interventions:
    for mode in MODES:
      by_layer = []
      for layer in layers:
        active = numbers == layer if mode == "single" else numbers >= layer
        used = means if intervention.how == "mean" else None
        disturbed = _disturbed(
          studied.model, studied.loaded.params, embedded, hidden, active, used, seeds, intervention=intervention
        )
        by_layer.append(compare(np.asarray(plain)[:count], np.asarray(disturbed)[:count]))
      outcomes.append(Outcome(*map(np.stack, zip(*by_layer, strict=True))))
  return Outcome(*map(np.stack, zip(*outcomes, strict=True)))


@functools.partial(jax.jit, static_argnames=("model", "intervention"))
def _disturbed(
  model: Any,
  params: Any,
  embedded: Any,
  hidden: Any,
  active: Any,
  means: Any,
  seeds: Any,
  *,
  intervention: Intervention,
) -> Any:
  keys = jax.vmap(jax.random.key)(seeds)
  return disrupted_logits(model, params, embedded, hidden, active, intervention, means, keys)


def compare(plain: Float[np.ndarray, "Q V"], disturbed: Float[np.ndarray, "Q V"]) -> Outcome:
  """What changed between two distributions over the next token; without the axes of interventions and layers."""
  log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (plain, disturbed))
  top = [np.argsort(-logits, axis=1, kind="stable")[:, :TOP] for logits in (plain, disturbed)]
  common = np.array([len(set(a) & set(b)) for a, b in zip(*top, strict=True)])
  return Outcome(
    is_same=top[0][:, 0] == top[1][:, 0],
    overlap=common / (2 * TOP - common),
    divergence=(np.exp(log_p) * (log_p - log_q)).sum(axis=1),
  )


def _log_softmax(logits: Float[np.ndarray, "Q V"]) -> Float[np.ndarray, "Q V"]:
  shifted = logits - logits.max(axis=1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
