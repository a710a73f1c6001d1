"""Ranks the decoder's layers by how little they change image tokens, as ShortV (arXiv 2504.00502) does for its table.

    python -m experiments.flow.rank_layers --checkpoint=demo --prompts=questions.jsonl --image_dir=images

A layer's score is the mean Kullback–Leibler divergence between the first answer token's distribution without any change
and without that layer's update of image tokens. Prints the layers in ascending order of their score, for
`--shortv_ranking` of `experiments.compare` or, cut to length, for `--method=shortv --prune_layers=…`.
"""

import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Bool, Float

from experiments.flow.decoder import run_layer
from experiments.question_sets import Question
from experiments.shared.subject import Subject
from himap_jax.engine import prefill
from himap_jax.errors import UserError
from himap_jax.generation import InputConfig
from himap_jax.inputs import IMAGE, Inputs
from himap_jax.model.network import Model
from himap_jax.run import command
from himap_jax.run.prompts import read_prompts

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_PROMPTS = flags.DEFINE_string("prompts", None, "As in himap_jax.run; the first ones are used.", required=True)
_IMAGE_DIR = flags.DEFINE_string("image_dir", ".", "As in himap_jax.run.")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 20, "How many prompts to average over.")


@jax.jit
def log_probabilities(model: Model, inputs: Inputs, frozen: Bool[Array, "L"]) -> Float[Array, "B V"]:
  """Log probabilities of the first answer token when the frozen layers do not update image tokens."""
  sequence = prefill.start(model.bind().embed(inputs))
  is_image = (inputs.layout.kind == IMAGE)[:, :, None]
  for layer in range(model.config.text.num_hidden_layers):
    updated, _ = run_layer(model, layer, sequence.x, sequence.positions)
    sequence = sequence._replace(x=jnp.where(frozen[layer] & is_image, sequence.x, updated))
  return jax.nn.log_softmax(prefill.last_logits(model.bind(), sequence), axis=-1)


def divergences(model: Model, batches: Iterable[Inputs]) -> Float[np.ndarray, "L"]:
  """For every layer the mean divergence, in nats, that the lack of its update of image tokens causes."""
  numbers = np.arange(model.config.text.num_hidden_layers)
  rows = []
  for inputs in batches:
    plain = log_probabilities(model, inputs, numbers < 0)
    frozen = (log_probabilities(model, inputs, numbers == layer) for layer in numbers)
    rows.append([float((jnp.exp(plain) * (plain - other)).sum(-1).mean()) for other in frozen])
  return np.mean(rows, axis=0)


def run() -> int:
  """Prints the ranking."""
  prompts = read_prompts(_PROMPTS.value)[: _NUM_PROMPTS.value]
  for prompt in prompts:
    if prompt.error is not None:
      raise UserError(f"{prompt.key}: {prompt.error}")
  directory = pathlib.Path(_IMAGE_DIR.value)
  questions = [Question(p.key, directory / p.image, p.question, "", "question", "") for p in prompts]
  inputs = InputConfig(prompt_buckets=(64, 128), batch_size=1)
  subject = Subject.load(_CHECKPOINT.value, questions, inputs=inputs)
  scores = divergences(subject.loaded.model, (batch.inputs for batch in subject.batches("ranking")))
  print(",".join(str(layer) for layer in np.argsort(scores, kind="stable")))
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("rank_layers", argv, run, resumes=False))
