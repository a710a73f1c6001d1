"""What calibration measures: flows by saliency, what they matter by disruption, HiMAP's scores in every layer, and agreement.

Axes: L layers, B batch, N image tokens.
"""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from experiments import kept
from experiments.calibrate.propose import Measured
from experiments.disruption import study as disruption
from experiments.disruption.interventions import BLOCKS, Intervention
from experiments.flow import scores
from experiments.flow.subject import Batch, Subject
from experiments.question_sets import is_right
from experiments.saliency import study as saliency

NAMES = ("instruction", "image")


def measure(
  studied: Subject, workdir: pathlib.Path, *, layers_at_a_time: int, disrupted_layers: Sequence[int]
) -> Measured:
  """Measures what is missing of a work directory.

  Args:
    studied: model and questions, which need no answers.
    workdir: directories of the saliency and the disruption, and a file of scores for every batch.
    layers_at_a_time: see `saliency.study`.
    disrupted_layers: where flows are taken out; what they matter in layers between is interpolated.
  """
  for name in ("saliency", "disruption"):
    (workdir / name).mkdir(exist_ok=True)
  _, flow = saliency.run(studied, workdir / "saliency", layers_at_a_time=layers_at_a_time)
  interventions = [Intervention(block, "block", "mask") for block in BLOCKS]
  _, outcome = disruption.run(studied, interventions, disrupted_layers, workdir / "disruption")
  changed = 1 - outcome.overlap[:: len(disruption.MODES)].mean(axis=2)  # of one layer alone
  weights = [np.interp(np.arange(studied.num_layers), disrupted_layers, values) for values in changed]
  received = []
  for batch in studied.batches("scores"):

    def score(batch: Batch = batch) -> dict[str, np.ndarray]:
      parts = scores.all_layers(studied.model, studied.loaded.params, jax.tree.map(jnp.asarray, batch.inputs))
      return {name: np.asarray(part)[:, : len(batch.questions)] for name, part in zip(NAMES, parts, strict=True)}

    received.append(kept.arrays_of(workdir / f"scores-{batch.number:05d}.npz", score))
  by_instruction, by_image = (np.concatenate([part[name] for part in received], axis=1) for name in NAMES)
  return Measured(flow.to_instruction, flow.to_image, *weights, by_instruction, by_image)


def agreement(given: dict[str, str], plain: dict[str, str]) -> Float[np.ndarray, "Q"]:
  """Whether each answer is the one without pruning."""
  return np.array([is_right(given[row_id], answer) for row_id, answer in plain.items()], np.float64)
