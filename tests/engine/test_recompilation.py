"""One compilation for a shape: other pictures, questions and lengths in the same bucket run the programs there are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import tiny_qwen2_vl

from himap_jax import GenerationConfig, InputConfig, build_schedule, checkpoint, generate
from himap_jax.engine import compiled
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.engine.engine import Engine
from himap_jax.engine.prefill import prefill
from himap_jax.families import examples
from himap_jax.inputs import Images

NAME = "siglip"
QUESTIONS = ("What is it?", "Why?", "A rather longer question?", "")
COMPILATION = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(autouse=True)
def nothing_compiled_before():
  compiled._programs.clear()


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


@pytest.mark.sampled(of="recompilation")
def test_prefill_is_traced_once(checkpoints, loaded, images):
  tiny, model = checkpoints(NAME), loaded(NAME)
  schedule = build_schedule("himap", num_layers=4, num_image_tokens=25, prune_layers=(1, 2), keep=(10, 5))

  @jax.jit
  @chex.assert_max_traces(n=1)
  def once(model, inputs, keys):
    return prefill(model.bind(), inputs, keys, schedule)

  keys = jax.random.split(jax.random.key(0), 2)
  for question in QUESTIONS[:3]:
    rows = [tiny.encode(image, f"<s>{question}<image>{question} :") for image in images[:2]]
    once(model.model, jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, 96)), keys)


@pytest.mark.sampled(of="recompilation")
def test_batches_of_one_bucket(loaded, images, compilations):
  model = loaded(NAME, batch_size=2)
  schedule = build_schedule("himap", num_layers=4, num_image_tokens=25, prune_layers=(1, 2), keep=(10, 5))
  processor = model.prompts("<image>{question}:")
  batcher = Batcher(512, processor.blank, [ImageBucket(1, 25)], buckets=(32,), max_new_tokens=3)
  engine = Engine(model.model, schedule, GenerationConfig(3))

  def run(pictures, questions):
    examples = [processor.prepare([own], question) for own, question in zip(pictures, questions, strict=True)]
    return engine(batcher.pack(examples, bucket=Bucket(1, 25, 32), batch_size=2), range(2))

  run(images[:2], QUESTIONS[:2])
  assert engine.programs.num_programs == 3
  assert len(compilations) >= 2
  compilations.clear()
  run(images[2:], QUESTIONS[2:])
  run(images[:1], ["<image> before the question?"])
  assert engine.programs.num_programs == 3
  assert compilations == []


def test_the_programs_that_were_used_last_are_kept(loaded, images, monkeypatch):
  model = loaded(NAME)
  processor = model.prompts("<image>{question}:")
  batcher = Batcher(512, processor.blank, [ImageBucket(1, 25)], buckets=(32,), max_new_tokens=3)
  batch = batcher.pack([processor.prepare(images[:1], "What?")], bucket=Bucket(1, 25, 32), batch_size=1)
  monkeypatch.setattr(compiled, "MAX_PROGRAMS", 4)

  def num_compiled(keep):
    engine = Engine(model.model, model.schedule("fastv", (1,), (keep,)), GenerationConfig(3))
    engine(batch, range(1))
    return engine.programs.num_programs

  assert [num_compiled(keep) for keep in (10, 10, 5, 10)] == [3, 0, 3, 3]
  assert len(compiled._programs) == 4


def test_pictures_of_other_sizes_in_a_ragged_bucket(tmp_path, compilations):
  tiny = tiny_qwen2_vl.make("qwen2_5_vl", tmp_path / "tiny")
  model = checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path)
  processor, bucket = model.prompts("<image>{question}"), Bucket(96, 24, 32, is_ragged=True)
  batcher = Batcher(512, processor.blank, [ImageBucket(*bucket[:2], is_ragged=True)], buckets=(32,), max_new_tokens=3)
  engine = Engine(model.model, model.schedule("himap", (1, 2), (0.5, 0.25)), GenerationConfig(3))

  def run(sizes):
    pictures = [tiny_checkpoints.noise_image(size, seed) for seed, size in enumerate(sizes)]
    examples = [processor.prepare([own], "Why?") for own in pictures]
    found = engine(batcher.pack(examples, bucket=bucket, batch_size=2), range(2))
    counts = [example.num_image_tokens for example in examples]
    assert list(map(len, found.kept[0])) == [round(count / 2) for count in counts]
    return counts

  first = run([(40, 40), (64, 24)])
  assert engine.programs.num_programs == 3 and len(compilations) >= 3
  compilations.clear()
  assert not set(run([(32, 24), (16, 56)])) & set(first)
  assert engine.programs.num_programs == 3 and compilations == []


@pytest.mark.sampled(of="recompilation")
def test_methods_of_equal_counts_share_all_but_prefill(loaded, images):
  model = loaded(NAME, batch_size=2)
  processor = model.prompts("<image>{question}:")
  batcher = Batcher(512, processor.blank, [ImageBucket(1, 25)], buckets=(32,), max_new_tokens=3)
  inputs = batcher.pack([processor.prepare([images[0]], "Why?")] * 2, bucket=Bucket(1, 25, 32), batch_size=2)
  first = None
  for method, expected in (("random", 3), ("divprune", 1), ("random", 0)):
    schedule = build_schedule(method, num_layers=4, num_image_tokens=25, prune_layers=(0,), keep=(9,))
    engine = Engine(model.model, schedule, GenerationConfig(3))
    result = engine(inputs, range(2))
    assert engine.programs.num_programs == expected
    first = first or result
  assert result.tokens == first.tokens and result.kept == first.kept


@pytest.mark.sampled(of="recompilation")
def test_another_length_of_answers_shares_the_prefill(loaded):
  model = loaded(NAME)
  schedule = build_schedule("himap", num_layers=4, num_image_tokens=25, prune_layers=(1, 2), keep=(11, 5))
  batcher = Batcher(512, model.prompts("<image>{question}:").blank, [ImageBucket(1, 25)], buckets=(32,))
  batch = batcher.pack([], bucket=Bucket(1, 25, 32), batch_size=1)
  for max_new_tokens, expected in ((3, 3), (5, 2), (3, 0)):
    engine = Engine(model.model, schedule, GenerationConfig(max_new_tokens))
    engine(batch, [0])
    assert engine.programs.num_programs == expected


def test_the_library_call_compiles_once(loaded, images, compilations):
  model = loaded(NAME)

  def ask(question):
    inputs = InputConfig(prompt_buckets=(32,), batch_size=1)
    generate(model, images[:1], [question], generation=GenerationConfig(2), inputs=inputs)

  ask("What is it?")
  assert len(compilations) >= 2
  compilations.clear()
  ask("Why?")
  assert not compilations


def test_another_picture_size_is_another_program(loaded, images):
  """The same number of slots, but pictures of another shape."""
  model = loaded("dinov2").model
  wide = [np.zeros((1, 3, *shape), np.float32) for shape in ((14, 28), (28, 14))]
  engine = Engine(model, build_schedule("none", num_layers=6, num_image_tokens=8), GenerationConfig(2))
  for pixels in wide:
    blank = examples.blank(Images(pixels[:0]))
    batcher = Batcher(512, blank, [ImageBucket(1, 8)], buckets=(32,), max_new_tokens=2)
    engine(batcher.pack([], bucket=Bucket(1, 8, 32), batch_size=1), [0])
  assert engine.programs.num_programs == 4  # of two pictures; the slots are the same
