"""Runs saliency over questions, batch by batch, a few layers at a time, and goes on from what a work directory holds.

Axes: L layers, B batch, Q questions, N image tokens, P blocks.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import kept
from experiments.flow.subject import Batch, Subject
from experiments.question_sets import Question
from experiments.saliency.saliency import Flow, flow_of

BY_LAYER = ("sums", "contributions", "to_instruction", "to_image")  # [L, B, …]; the others are [B, …]


def run(studied: Subject, workdir: pathlib.Path, *, layers_at_a_time: int) -> tuple[list[Question], Flow]:
  """The flow of all questions, in the order of their batches.

  Args:
    studied: model and questions.
    workdir: a file for every batch.
    layers_at_a_time: whose saliency is held at once.

  Returns:
    The questions, and their flow with Q in place of B.
  """
  questions, flows = [], []
  for batch in studied.batches("saliency"):
    path = workdir / f"flow-{batch.number:05d}.npz"
    arrays = kept.arrays_of(path, lambda batch=batch: _measure(studied, batch, layers_at_a_time)._asdict())
    flows.append(Flow(**arrays))
    questions += batch.questions
  joined = {
    name: np.concatenate([getattr(flow, name) for flow in flows], axis=int(name in BY_LAYER)) for name in Flow._fields
  }
  return questions, Flow(**joined)


def _measure(studied: Subject, batch: Batch, layers_at_a_time: int) -> Flow:
  """The flow of a batch's real rows in all layers."""
  inputs = jax.tree.map(jnp.asarray, batch.inputs)
  answers, parts = None, []
  for first in range(0, studied.num_layers, layers_at_a_time):
    layers = tuple(range(first, min(first + layers_at_a_time, studied.num_layers)))
    part, answers = flow_of(studied.model, studied.loaded.params, inputs, answers, layers=layers)
    parts.append(jax.tree.map(np.asarray, part))
  count = len(batch.questions)

  def join(name: str) -> np.ndarray:
    if name in BY_LAYER:
      return np.concatenate([getattr(part, name) for part in parts])[:, :count]
    return getattr(parts[0], name)[:count]

  return Flow(**{name: join(name) for name in Flow._fields})
