"""One compilation for a shape: other pictures, questions and lengths in the same bucket run the programs there are."""

import chex
import jax
import jax.numpy as jnp
import pytest
import tiny_checkpoints

from himap_jax.generation import Generator, generate
from himap_jax.llava import Inputs, Llava
from himap_jax.methods import build_schedule
from himap_jax.prefill import prefill
from himap_jax.processing import Processor

NAME = "siglip"
QUESTIONS = ("What is it?", "Why?", "A rather longer question?", "")
COMPILATION = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
  """A list that grows by one with every program that XLA compiles, whoever asks for it."""
  seen = []

  def listen(event, duration, **metadata):
    if event == COMPILATION:
      seen.append(metadata)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_prefill_is_traced_once(checkpoints, loaded, images):
  tiny, model = checkpoints(NAME), loaded(NAME)
  schedule = build_schedule("himap", num_layers=4, num_image_tokens=25, prune_layers=(1, 2), keep=(10, 5))
  once = jax.jit(chex.assert_max_traces(prefill, n=1), static_argnums=(0, 4))
  keys = jax.random.split(jax.random.key(0), 2)
  for question in QUESTIONS[:3]:
    rows = [tiny.encode(image, f"<s>{question}<image>{question} :") for image in images[:2]]
    batch = Inputs(**jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, 96)))
    once(Llava(model.config, jnp.float32), model.params, batch, keys, schedule)


def test_batches_of_one_bucket(loaded, images, compilations):
  model = loaded(NAME, batch_size=2)
  schedule = build_schedule("himap", num_layers=4, num_image_tokens=25, prune_layers=(1, 2), keep=(10, 5))
  processor = Processor(model.processor, model.config, template="<image>{question}:", buckets=(32,), max_new_tokens=3)
  generator = Generator(model, schedule, max_new_tokens=3)

  def run(pictures, questions):
    examples = [processor.prepare(*pair) for pair in zip(pictures, questions, strict=True)]
    return generator(processor.batch(examples, bucket=32, batch_size=2), range(2))

  run(images[:2], QUESTIONS[:2])
  assert generator.num_programs == 2
  assert len(compilations) >= 2
  compilations.clear()
  run(images[2:], QUESTIONS[2:])
  run(images[:1], ["<image> before the question?"])
  assert generator.num_programs == 2
  assert compilations == []


def test_the_library_call_compiles_once(loaded, images, compilations):
  model = loaded(NAME)

  def ask(question):
    generate(model, images[:1], [question], max_new_tokens=2, prompt_buckets=(32,), batch_size=1)

  ask("What is it?")
  assert len(compilations) >= 2
  compilations.clear()
  ask("Why?")
  assert not compilations
