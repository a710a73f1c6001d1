"""The demo's training: packing is asking one by one, adapters survive a round trip, whitening folds away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import demo_model
from experiments.demo_data import UNUSED, Batch, Lesson, Packer
from himap_jax.llava import Inputs, Llava
from himap_jax.processing import Processor


def test_whitening_folds_into_the_projector():
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 3, jnp.float32)
  variances, axes = np.linalg.eigh(np.cov(np.asarray(features, np.float64).T))
  matrix = jnp.asarray((axes / np.sqrt(variances + 1e-6)) @ axes.T, jnp.float32)
  whitening = demo_model.Whitening(features.mean(0), matrix)
  whitened = (features - features.mean(0)[None]) @ matrix
  np.testing.assert_allclose(np.cov(whitened.T), np.eye(6), atol=1e-2)
  projector = {"linear_1": {"weight": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "bias": jnp.ones(4)}}
  folded = whitening.fold(projector)["linear_1"]
  expected = whitened @ projector["linear_1"]["weight"].T + 1
  np.testing.assert_allclose(features @ folded["weight"].T + folded["bias"][None], expected, atol=1e-3)
  back = whitening.unfold({"linear_1": folded})["linear_1"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), back, projector["linear_1"])


def test_adapter_round_trip(tmp_path):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32)  # noqa: E731
  projector = {f"linear_{i}": {"weight": draw(4, 6), "bias": draw(4)} for i in (1, 2)}
  lora = {f"language_model/layers_{i}/mlp/up_proj": {"a": draw(2, 4), "b": draw(8, 2)} for i in (0, 11)}
  demo_model.export_adapter(tmp_path / "adapter.safetensors", projector, lora)
  read_projector, read_lora = demo_model.import_adapter(str(tmp_path / "adapter.safetensors"))
  jax.tree.map(np.testing.assert_array_equal, (read_projector, read_lora), (projector, lora))


def test_adapters_average():
  adapters = [{"linear": {"weight": jnp.full(3, value)}} for value in (2.0, 6.0)]
  mean = demo_model.average(adapters, [0.25, 0.75])
  np.testing.assert_array_equal(mean["linear"]["weight"], [5, 5, 5])
  for shares in ([0.5, 0.6], [1.0]):
    with pytest.raises(ValueError, match="2 shares are needed"):
      demo_model.average(adapters, shares)


def test_packed_questions_see_the_prefix_and_themselves():
  segments = jnp.asarray([[0, 0, 1, 1, 2, 2, UNUSED]])
  zeros = jnp.zeros((1, 7), jnp.int32)
  batch = Batch(zeros, zeros, segments, zeros[:, 0], zeros, zeros, zeros, zeros, zeros)
  expected = [  # before causality
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0],
    [1, 1, 0, 0, 1, 1, 0],
    [1, 1, 0, 0, 1, 1, 0],
    [1, 1, 0, 0, 0, 0, 1],
  ]
  np.testing.assert_array_equal(batch.mask()[0, 0], np.array(expected, bool))


def test_packed_answers_are_predicted_as_one_by_one(loaded, images):
  tiny = loaded("clip_mha")
  model = Llava(tiny.config, jnp.float32)
  side = tiny.config.vision.image_size
  packer = Packer(tiny.processor, tiny.config, image_size=side, question_slots=160)
  lessons = [
    Lesson(images[0], [("what is it?", "a cat"), ("how many?", "3"), ("where?", "left")]),
    Lesson(images[1], [("is it red?", "no")]),
  ]
  batch = packer.pack(lessons)
  logits = np.asarray(demo_model.answer_logits(model, tiny.params, {}, batch))
  processor = Processor(tiny.processor, tiny.config)
  for row, lesson in enumerate(lessons):
    for number, (question, answer) in enumerate(lesson.questions):
      example = processor.prepare(lesson.picture, question)
      expected_answer = [
        *tiny.processor.tokenizer(answer, add_special_tokens=False)["input_ids"],
        tiny.processor.tokenizer.eos_token_id,
      ]
      image = [tiny.config.image_token_id] * processor.num_image_tokens
      tokens = [*example.before, *image, *example.after, *expected_answer]
      inputs = Inputs(
        tokens=jnp.asarray([tokens], jnp.int32),
        length=jnp.asarray([len(tokens)], jnp.int32),
        image_start=jnp.asarray([len(example.before)], jnp.int32),
        pixel_values=jnp.asarray(example.pixel_values)[None],
      )
      alone = np.asarray(model.apply({"params": tiny.params}, inputs))[0, -len(expected_answer) - 1 : -1]
      mine = np.asarray(batch.answer_valid[row] & (batch.answer_question[row] == number))
      assert np.asarray(batch.answers)[row][mine].tolist() == expected_answer
      np.testing.assert_allclose(logits[row][mine], alone, atol=1e-4)
  assert int(batch.answer_valid.sum()) == sum(len(answer) + 1 for lesson in lessons for _, answer in lesson.questions)
