"""Which layers change image tokens least? Ranks the decoder's layers as for ShortV (arXiv 2504.00502).

    python -m experiments.flow.rank_layers --question_set=questions.jsonl --num_questions=20 --workdir=work --output=out

A layer's score is the mean Kullback–Leibler divergence between the first answer token's distributions with and without
the layer's update of image tokens. Prints the layers in ascending order of score, for `--shortv_ranking` of
`experiments.compare` or, cut to length, for `--method=shortv --prune_layers=…`.

Axes: L layers, B batch, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from experiments.flow.decoder import run_layer
from experiments.shared import statistics, study
from experiments.shared.subject import Batch
from himap_jax.engine import prefill
from himap_jax.inputs import IMAGE, Inputs
from himap_jax.model.network import Model


@jax.jit
def log_probabilities(model: Model, inputs: Inputs, frozen: Bool[Array, "L"]) -> Float[Array, "B V"]:
  """Log probabilities of the first answer token if the frozen layers do not update image tokens."""
  sequence = prefill.start(model.bind().embed(inputs))
  is_image = (inputs.layout.kind == IMAGE)[:, :, None]
  for layer in range(model.config.text.num_hidden_layers):
    updated, _ = run_layer(model, layer, sequence.x, sequence)
    sequence = sequence._replace(x=jnp.where(frozen[layer] & is_image, sequence.x, updated))
  return jax.nn.log_softmax(prefill.last_logits(model.bind(), sequence), axis=-1)


def divergences(model: Model, inputs: Inputs) -> Float[np.ndarray, "L B"]:
  """Divergence, in nats, caused by skipping each layer's update of image tokens."""
  numbers = np.arange(model.config.text.num_hidden_layers)
  plain = log_probabilities(model, inputs, numbers < 0)
  frozen = (log_probabilities(model, inputs, numbers == layer) for layer in numbers)
  return np.stack([(jnp.exp(plain) * (plain - other)).sum(axis=-1) for other in frozen])


def run(values: Any) -> study.Report:
  del values
  subject = study.load_subject()

  def compute(batch: Batch) -> dict[str, np.ndarray]:
    return {"divergence": divergences(subject.loaded.model, batch.inputs)}

  questions, measured = subject.measure(study.workdir_for(subject) / "layers", compute, axis=1)
  rows = [{"layer": layer} | row for layer, row in enumerate(statistics.mean_rows(measured, seed=subject.seed))]
  ranking = sorted(range(len(rows)), key=lambda layer: rows[layer]["divergence"])
  return study.Report(f"{len(questions)} questions", [",".join(map(str, ranking))], {"rank_layers": rows})


if __name__ == "__main__":
  study.start("flow.rank_layers", lambda: None, run)
