"""A subject of the studies that is shared by all their tests."""

import pytest


@pytest.fixture(scope="session")
def tiny_subject(loaded, images, tmp_path_factory):
  """Returns `make(texts)`: the tiny model `dinov2_shrunk` with one question for each text, about four pictures in turn."""
  from experiments.question_sets import Question
  from experiments.shared.subject import Subject
  from himap_jax.engine.batching import Batcher, ImageBucket

  model, directory = loaded("dinov2_shrunk"), tmp_path_factory.mktemp("pictures")
  for number, image in enumerate(images):
    image.save(directory / f"{number}.png")
  processor = model.prompts("<image>{question}")

  def make(texts):
    questions = [Question(f"q{i}", directory / f"{i % 4}.png", text, "x", "t", "") for i, text in enumerate(texts)]
    batcher = Batcher(
      512, processor.blank, [ImageBucket(1, processor.num_image_tokens)], buckets=(24,), max_new_tokens=3
    )
    return Subject(model, lambda: model, processor, batcher, questions, batch_size=2)

  return make
