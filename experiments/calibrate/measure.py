"""What calibration measures: flows by saliency, what they matter by disruption, HiMAP's scores in every layer, and agreement.

Axes: L layers, B batch, N image tokens.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from experiments.calibrate.propose import Measured
from experiments.disruption import study as disruption
from experiments.disruption.interventions import BLOCKS, Intervention
from experiments.flow import subject
from experiments.flow.subject import Subject
from experiments.question_sets import is_right
from experiments.saliency import study as saliency
from himap_jax.generation import Generator
from himap_jax.llava import Inputs, Llava
from himap_jax.prefill import start
from himap_jax.schedule import Schedule
from himap_jax.scoring import queries_of, received_attention


@functools.partial(jax.jit, static_argnames="model")
def scores(model: Llava, params: Any, inputs: Inputs) -> tuple[Float[Array, "L B N"], Float[Array, "L B N"]]:
  """The attention that every image token receives in each layer, from the instruction and from the image, without pruning."""
  bound = model.bind({"params": params})
  sequence = start(bound.embed(inputs))
  x, layout, received = sequence.x, sequence.layout, []
  rows, valid = layout.instruction_slots(x.shape[1])
  for layer in range(model.config.text.num_hidden_layers):
    x, (p,) = bound.language_model(x, sequence.positions, first=layer, last=layer + 1)
    received.append(
      (
        received_attention(queries_of(p, rows), p.key, layout, rows, valid),
        received_attention(queries_of(p, layout.image_slots()), p.key, layout, layout.image_slots()),
      )
    )
  return tuple(map(jnp.stack, zip(*received, strict=True)))


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
  for batch in studied.batches():
    path = workdir / f"scores-{batch.number:05d}.npz"
    if not path.exists():
      inputs = jax.tree.map(jnp.asarray, batch.inputs)
      parts = scores(studied.model, studied.loaded.params, inputs)
      names = ("instruction", "image")
      count = len(batch.questions)
      subject.save(path, {name: np.asarray(part)[:, :count] for name, part in zip(names, parts, strict=True)})
    received.append(subject.load(path))
  by_instruction, by_image = (
    np.concatenate([part[name] for part in received], axis=1) for name in ("instruction", "image")
  )
  return Measured(flow.to_instruction, flow.to_image, *weights, by_instruction, by_image)


def answers(studied: Subject, schedule: Schedule, path: pathlib.Path, *, max_new_tokens: int) -> dict[str, str]:
  """The greedy answers of all questions, from a file where it is there."""
  if not path.exists():
    generator = Generator(studied.loaded, schedule, max_new_tokens=max_new_tokens, seed=studied.seed)
    given = {}
    total = -(-len(studied.questions) // studied.batch_size)
    for batch in tqdm(studied.batches(), desc=path.stem, total=total, unit="batch", disable=None):
      ids = [question.id for question in batch.questions]
      padded = ids + ids[-1:] * (studied.batch_size - len(ids))
      result = generator(batch.inputs, padded)
      given |= {row_id: studied.processor.decode(tokens) for row_id, tokens in zip(ids, result.tokens, strict=False)}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
  return json.loads(path.read_text(encoding="utf-8"))


def agreement(given: dict[str, str], plain: dict[str, str]) -> Float[np.ndarray, "Q"]:
  """Whether each answer is the one without pruning."""
  return np.array([is_right(given[row_id], answer) for row_id, answer in plain.items()], np.float64)
