"""Ranks the decoder's layers by how little they do to image tokens, as ShortV (arXiv 2504.00502) does for its table.

    python -m experiments.rank_layers --checkpoint=demo --prompts=questions.jsonl --image_dir=images --num_prompts=20

A layer's score is the mean Kullback–Leibler divergence between the first answer token's distribution without any change and
with that layer's update of image tokens left out. Prints the layers, least useful first, for `--shortv_ranking` of
`experiments.compare` or, cut to length, for `--method=shortv --prune_layers=…`.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

from himap_jax import checkpoint
from himap_jax.images import load_image
from himap_jax.llava import Inputs, Llava
from himap_jax.processing import Processor
from himap_jax.prompts import RowError, read_prompts

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "As in himap_jax.run.")
_PROMPTS = flags.DEFINE_string("prompts", None, "As in himap_jax.run; the first ones are used.", required=True)
_IMAGE_DIR = flags.DEFINE_string("image_dir", ".", "As in himap_jax.run.")
_NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 20, "How many prompts to average over.")


def first_logits(model: Llava, params: Any, inputs: Inputs, frozen: Bool[Array, "L"]) -> Float[Array, "B V"]:
  """Logits of the first answer token when the frozen layers leave image tokens as they are."""
  bound = model.bind({"params": params})
  x, layout, _ = bound.embed(inputs)
  slot = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  offset = slot - layout.image_start[:, None]
  is_image = ((offset >= 0) & (offset < layout.num_image_tokens))[:, :, None]
  for layer in range(model.config.text.num_hidden_layers):
    updated, _ = bound.language_model(x, jnp.broadcast_to(slot, x.shape[:2]), first=layer, last=layer + 1)
    x = jnp.where(frozen[layer] & is_image, x, updated)
  last = jnp.take_along_axis(x, (layout.length - 1)[:, None, None], axis=1)
  return bound.logits(last)[:, 0]


def divergences(model: Llava, params: Any, batches: list[Inputs]) -> np.ndarray:
  """For every layer the mean divergence, in nats, that leaving out its update of image tokens causes."""
  num_layers = model.config.text.num_hidden_layers

  @functools.partial(jax.jit, static_argnums=0)
  def log_probabilities(model: Llava, params: Any, inputs: Inputs, frozen: Array) -> Array:
    return jax.nn.log_softmax(first_logits(model, params, inputs, frozen), axis=-1)

  totals = np.zeros(num_layers)
  for inputs in tqdm(batches, unit="prompt", disable=None):
    plain = log_probabilities(model, params, inputs, jnp.zeros(num_layers, bool))
    for layer in range(num_layers):
      frozen = log_probabilities(model, params, inputs, jnp.arange(num_layers) == layer)
      totals[layer] += float((jnp.exp(plain) * (plain - frozen)).sum(-1).mean())
  return totals / len(batches)


def main(_) -> None:
  loaded = checkpoint.load(_CHECKPOINT.value, dtype=jnp.float32)
  processor = Processor(loaded.processor, loaded.config, buckets=(64, 128))
  batches = []
  for prompt in read_prompts(pathlib.Path(_PROMPTS.value))[: _NUM_PROMPTS.value]:
    if isinstance(prompt, RowError):
      raise app.UsageError(f"{prompt.id}: {prompt.message}")
    example = processor.prepare(load_image(pathlib.Path(_IMAGE_DIR.value) / prompt.image), prompt.question)
    batches.append(processor.batch([example], bucket=processor.bucket(example), batch_size=1))
  scores = divergences(Llava(loaded.config, jnp.float32), loaded.params, batches)
  print(",".join(str(layer) for layer in np.argsort(scores, kind="stable")))


if __name__ == "__main__":
  app.run(main)
