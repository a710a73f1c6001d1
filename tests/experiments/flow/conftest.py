"""A subject of the studies that is shared by all their tests."""

import pytest


@pytest.fixture(scope="session")
def tiny_subject(loaded, images, tmp_path_factory):
  """Returns `make(texts, name)`: a tiny model with one question for each text, about four pictures in turn."""
  from experiments.question_sets import Question
  from experiments.shared.subject import Subject
  from himap_jax.engine.batching import Batcher, ImageBucket

  directory = tmp_path_factory.mktemp("pictures")
  for number, image in enumerate(images):
    image.save(directory / f"{number}.png")

  def make(texts, name):
    model = loaded(name)
    processor = model.prompts("<image>{question}")
    questions = [Question(f"q{i}", directory / f"{i % 4}.png", text, "x", "t", "") for i, text in enumerate(texts)]
    batcher = Batcher(
      512, processor.blank, [ImageBucket(1, processor.num_image_tokens)], buckets=(24,), max_new_tokens=3
    )
    return Subject(model, lambda: model, processor, batcher, questions, batch_size=2)

  return make


@pytest.fixture(scope="session")
def mllama(tmp_path_factory):
  """A tiny model whose text reads the image by cross-attention, in both frameworks."""
  import tiny_mllama

  return tiny_mllama.make(tmp_path_factory.mktemp("mllama"))
