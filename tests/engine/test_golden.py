"""Outputs recorded before the per-slot layout, method by method: kept sets and tokens to the last one, logits in float32.

Every row has them wherever it stands in its batch, whatever the padding holds.

On the machine that recorded them the logits were equal to the last bit, except ShortV's, which differed by up to 1e-5. XLA
rounds differently on other processors and without its optimisations, which the tolerance allows for.
"""

import pathlib

import numpy as np
import pytest

from himap_jax import GenerationConfig, InputConfig, Sampling, generate
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.engine.engine import Engine
from himap_jax.inputs import PADDING
from himap_jax.pruning.methods import METHODS

GOLDEN = np.load(pathlib.Path(__file__).with_name("golden.npz"))
QUESTIONS = (
  "What is it?",
  "<image>Where is the dog?",
  "A longer text stands before the image here. <image> ?",
  "And a question that is a good deal longer than the other three.",
)
BEFORE = ("random", "uniform", "fastervlm", "visionzip", "vispruner", "divprune", "cdpruner", "prumerge")
SETTINGS = {  # layers and keep counts
  "none": ((), ()),
  "himap": ((2, 3), (8, 4)),
  "himap_swapped": ((2, 3), (8, 4)),
  "instruction_attention": ((2,), (7,)),
  "image_attention": ((3,), (7,)),
  "fastv": ((2,), (5,)),
  "pyramiddrop": ((1, 2, 3), (8, 4, 2)),
  "sparsevlm": ((1, 2, 3), (9, 6, 3)),
  "dart": ((2,), (7,)),
  "fitprune": ((1, 2, 3), (13, 9, 6)),
  "shortv": ((1, 3), None),
  **{name: ((0,), (7,)) for name in BEFORE},
  "divprune+himap": ((0, 2, 3), (10, 6, 3)),
  "visionzip+fastv": ((0, 3), (8, 3)),
}


CASES = sorted({key.rsplit("/", 2)[0] for key in GOLDEN.files})


def in_reverse(model, images):
  """The same rows in the opposite order, with another token in the padding."""
  processor = model.prompts()
  batcher = Batcher(512, processor.blank, [ImageBucket(1, processor.num_image_tokens)], buckets=(128,))
  examples = [processor.prepare([image], question) for image, question in zip(images, QUESTIONS, strict=True)]
  batch = batcher.pack(examples[::-1], bucket=batcher.buckets[0], batch_size=4)
  return batch.replace(tokens=np.where(batch.layout.kind == PADDING, 9, batch.tokens))


@pytest.mark.sampled
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_recorded(case, loaded, images):
  method, *sampled = case.split("/")
  model = loaded("clip_mha")
  prune_layers, keep = SETTINGS[method]
  generation = GenerationConfig(8, ignore_eos=True)
  if sampled:
    generation = GenerationConfig(8, Sampling(0.9, 0.8), seed=5, ignore_eos=True)
  schedule = model.schedule(method, prune_layers, keep)
  inputs = InputConfig(prompt_buckets=(128,), batch_size=4, prefill_batch_size=4)
  answers = generate(model, images, QUESTIONS, schedule=schedule, generation=generation, inputs=inputs)
  for row, answer in enumerate(answers):
    assert answer.token_ids == GOLDEN[f"{case}/{row}/tokens"].tolist()
    recorded = [GOLDEN[f"{case}/{row}/kept{stage}"].tolist() for stage in range(len(answer.kept))]
    assert answer.kept == recorded
    np.testing.assert_allclose(answer.first_logits, GOLDEN[f"{case}/{row}/logits"], atol=1e-4, rtol=0)
  engine = Engine(model.model, schedule, generation)
  reverse = engine(in_reverse(model, images), range(4)[::-1])
  assert engine.programs.num_programs == 0
  for row, answer in enumerate(answers):
    assert reverse.tokens[3 - row] == answer.token_ids
    assert [stage[3 - row] for stage in reverse.kept] == answer.kept
    np.testing.assert_allclose(reverse.logits[3 - row], answer.first_logits, atol=1e-5, rtol=0)


def test_every_method_of_a_fixed_count_is_recorded():
  later = {"scope", "fsr", "visiontrim", "visipruner"}  # than the recording
  assert set(METHODS) - {"himap_adaptive"} - later <= set(CASES)


def test_all_recorded_answers_are_compared():
  assert set(SETTINGS) == {case.split("/")[0] for case in CASES} and len(CASES) == 22
