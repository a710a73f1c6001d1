"""Scores of continuations against whole sequences in transformers' own layers, pruned and not, float32."""

import jax
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
import torch

from himap_jax import GenerationConfig, Schedule
from himap_jax.engine.engine import Engine

NUM_SLOTS = 128
GREEDY = 5  # tokens of the greedy answer that are one continuation


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "layers", "keep"), [("clip_mha", (), ()), ("mistral", (2, 4), (8, 4))])
def test_scores_are_the_reference_s(checkpoints, loaded, images, name, layers, keep):
  """Of one, two and three continuations, one of them the greedy answer."""
  tiny, model = checkpoints(name), loaded(name)
  schedule = model.schedule("himap", layers, keep) if layers else Schedule()
  rows = tiny.rows(images)[:3]
  inputs = tiny_checkpoints.pad_batch(rows, NUM_SLOTS)
  engine = Engine(model.model, schedule, GenerationConfig(GREEDY, ignore_eos=True))
  result = engine(inputs, range(3))
  rng = np.random.default_rng(0)
  continuations = [[result.tokens[row], *rng.integers(4, 250, (row, 9)).tolist()] for row in range(3)]
  before = engine.programs.num_programs
  found = engine.score(inputs, range(3), continuations)
  assert engine.programs.num_programs == before + 2, (
    "one program for each padded length; the prefill is that of generation"
  )
  for row, (ids, pixels) in enumerate(rows):
    for given, own in zip(continuations[row], found[row], strict=True):
      frozen = [tuple(stage[row]) for stage in result.kept]
      whole = torch.cat([ids, torch.tensor(given)])
      settings = dict(prune_layers=layers, keep=keep, frozen=frozen)
      logits = reference_himap.forward(tiny.model, whole, pixels, **settings).logits[-len(given) - 1 : -1]
      log_probabilities = logits.log_softmax(dim=-1)[range(len(given)), given]
      np.testing.assert_allclose(own.log_probability, log_probabilities.sum(), atol=1e-3)
      assert own.is_greedy == (logits.argmax(dim=-1).tolist() == given) == (given == result.tokens[row])


def test_no_continuations(loaded, checkpoints, images):
  inputs = tiny_checkpoints.pad_batch(checkpoints("clip_mha").rows(images)[:2], NUM_SLOTS)
  engine = Engine(loaded("clip_mha").model, Schedule())
  assert engine.score(jax.tree.map(np.asarray, inputs), range(2), [[], []]) == [[], []]
