"""Disrupts every layer in every way, question by question, and goes on from what a work directory holds.

Axes: I interventions and modes, L layers of the study, B batch, Q questions, V vocabulary; in `Sums` and `Flows` L layers of the
model, E places counted from a prompt's end, M image tokens, N query heads, H head dim.
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
  Flows,
  Intervention,
  disrupted_logits,
  flows,
  instruction_places,
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


class Sums(NamedTuple):
  """Of `Flows` over all questions.

  Attributes:
    into_instruction: `[L, E, N, H]`.
    into_image: `[L, M, N, H]`.
    count: `[E]` questions with an instruction token at that place.
    num_questions: `[]` all.
  """

  into_instruction: Float[np.ndarray, "L E N H"]
  into_image: Float[np.ndarray, "L M N H"]
  count: Int[np.ndarray, "E"]
  num_questions: Int[np.ndarray, ""]


def run(
  studied: Subject, interventions: Sequence[Intervention], layers: Sequence[int], workdir: pathlib.Path
) -> tuple[list[Question], Outcome]:
  """The outcome of all questions, in the order of their batches; interventions × modes in that order.

  Args:
    studied: model and questions.
    interventions: what is done.
    layers: where; in the mode `onward`, from where on.
    workdir: a file for every batch, and one for the sums of what flows.
  """
  sums = None
  if any(one.how == "mean" for one in interventions):
    sums = Sums(**kept.arrays_of(workdir / "sums.npz", lambda: _sums(studied)._asdict()))
  questions, outcomes = [], []
  for batch in studied.batches("disrupting"):
    path = workdir / f"outcome-{batch.number:05d}.npz"
    arrays = kept.arrays_of(path, lambda batch=batch: _measure(studied, batch, interventions, layers, sums)._asdict())
    outcomes.append(Outcome(**arrays))
    questions += batch.questions
  return questions, Outcome(*(np.concatenate(parts, axis=2) for parts in zip(*outcomes, strict=True)))


@functools.partial(jax.jit, static_argnames="model")
def _undisturbed(model: Any, params: Any, inputs: Any) -> Any:
  embedded = model.bind({"params": params}).embed(inputs)
  return embedded, *undisturbed(model, params, embedded)


@functools.partial(jax.jit, static_argnames="model")
def _flows(model: Any, params: Any, embedded: Any, hidden: Any) -> tuple[Flows, Bool[Any, "B E"]]:
  return flows(model, params, embedded, hidden), instruction_places(embedded[1], hidden.shape[2])


def _sums(studied: Subject) -> Sums:
  """Over all questions."""
  by_places: dict[int, Sums] = {}  # buckets differ in how many places there are
  for batch in studied.batches("flows"):
    inputs = jax.tree.map(jnp.asarray, batch.inputs)
    embedded, hidden, _ = _undisturbed(studied.model, studied.loaded.params, inputs)
    own, has_place = _flows(studied.model, studied.loaded.params, embedded, hidden)
    rows = len(batch.questions)
    part = Sums(
      *(np.asarray(x[:, :rows]).sum(axis=1) for x in own), np.asarray(has_place)[:rows].sum(axis=0), np.int64(rows)
    )
    before = by_places.get(len(part.count))
    by_places[len(part.count)] = part if before is None else Sums(*map(np.add, before, part))
  longest = max(by_places)

  def padded(part: Sums) -> Sums:
    missing = (0, longest - len(part.count))
    return part._replace(
      into_instruction=np.pad(part.into_instruction, ((0, 0), missing, (0, 0), (0, 0))),
      count=np.pad(part.count, missing),
    )

  return Sums(*map(sum, zip(*map(padded, by_places.values()), strict=True)))


def mean_of_others(sums: Sums, own: Flows, has_place: Bool[np.ndarray, "B E"]) -> Flows:
  """For each row the mean over all other questions; nothing where no other has a token at that place.

  Args:
    sums: over all questions, these among them.
    own: of these.
    has_place: where these have instruction tokens.
  """
  places = has_place.shape[1]
  count = (sums.count[:places] - has_place)[None, :, :, None, None]
  others = sums.into_instruction[:, None, :places] - own.into_instruction
  into_instruction = np.where(count > 0, others / np.maximum(count, 1), 0)
  num_others = sums.num_questions - 1
  into_image = (sums.into_image[:, None] - own.into_image) / np.maximum(num_others, 1) * (num_others > 0)
  return Flows(into_instruction.astype(np.float32), into_image.astype(np.float32))


def _measure(
  studied: Subject,
  batch: Batch,
  interventions: Sequence[Intervention],
  layers: Sequence[int],
  sums: Sums | None,
) -> Outcome:
  """The outcome of a batch's real rows."""
  inputs = jax.tree.map(jnp.asarray, batch.inputs)
  embedded, hidden, plain = _undisturbed(studied.model, studied.loaded.params, inputs)
  seeds = jnp.asarray(row_seeds(studied.seed, batch.row_ids))
  count, numbers = len(batch.questions), jnp.arange(studied.num_layers, dtype=jnp.int32)
  means = None
  if sums is not None:
    own = jax.tree.map(np.asarray, _flows(studied.model, studied.loaded.params, embedded, hidden))
    means = jax.tree.map(jnp.asarray, mean_of_others(sums, *own))
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
