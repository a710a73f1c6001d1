"""The demo's training: packing is asking one by one, adapters survive a round trip, whitening folds away."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_cross
from checkpoints import layouts
from PIL import Image

from checkpoints_convert.demo.cross import trained
from experiments.demo_model import adapter, align, scenes, torch_gradients, train, training
from experiments.demo_model.adapter import Adapter, Whitening
from experiments.demo_model.cutouts import KINDS, Cutout
from experiments.demo_model.data import Pool, Sample, Shares
from experiments.demo_model.gradients import jax_gradients
from experiments.demo_model.packing import UNUSED, Batch, Packer
from experiments.demo_model.recipes import RECIPES, Part, Rates, Recipe, Stage
from experiments.demo_model.torch_gradients import TorchGradients
from himap_jax import checkpoint
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.errors import UserError

pytestmark = pytest.mark.sampled(of="files of studies", by="file")


def test_whitening_folds_into_the_projector():
  rng = np.random.default_rng(0)
  features = jnp.asarray(rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + 3, jnp.float32)
  variances, axes = np.linalg.eigh(np.cov(np.asarray(features, np.float64).T))
  matrix = jnp.asarray((axes / np.sqrt(variances + 1e-6)) @ axes.T, jnp.float32)
  whitening = Whitening(features.mean(0), matrix)
  whitened = (features - features.mean(0)[None]) @ matrix
  np.testing.assert_allclose(np.cov(whitened.T), np.eye(6), atol=1e-2)
  projector = {"linear_1": {"weight": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "bias": jnp.ones(4)}}
  folded = whitening.fold(projector)["linear_1"]
  expected = whitened @ projector["linear_1"]["weight"].T + 1
  np.testing.assert_allclose(features @ folded["weight"].T + folded["bias"][None], expected, atol=1e-3)
  back = whitening.unfold({"linear_1": folded})["linear_1"]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), back, projector["linear_1"])


def test_adapter_round_trip(tmp_path):
  """Vectors to the last bit; matrices to half a step, of which 31 reach the largest number of the row or column."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32)  # noqa: E731
  projector = {f"linear_{i}": {"weight": draw(4, 6), "bias": draw(4)} for i in (1, 2)}
  lora = {f"language_model/layers_{i}/mlp/up_proj": {"a": draw(2, 4), "b": draw(8, 2)} for i in (0, 11)}
  cross = {"language_model/layers_1": {"cross_attn_attn_gate": draw(1)}}
  cross |= {f"language_model/layers_1/cross_attn/{name}_proj": {"weight": draw(4, 4)} for name in ("k", "v")}
  own = Adapter(projector, lora, cross)
  own.save(tmp_path / "adapter.safetensors")
  found = Adapter.read(str(tmp_path / "adapter.safetensors"))
  assert jax.tree.structure(found) == jax.tree.structure(own)
  for before, after in zip(*map(jax.tree.leaves, (own, found)), strict=True):
    if before.ndim == 1:
      np.testing.assert_array_equal(after, before)
    else:
      steps = np.abs(before).max(axis=int(before.shape[0] < before.shape[1]), keepdims=True) / 31
      assert (np.abs(after - before) <= 0.501 * steps).all() and (after != before).any()
  found.save(tmp_path / "again.safetensors")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), Adapter.read(tmp_path / "again.safetensors"), found
  )


def test_a_wider_projector_says_the_same(loaded):
  model, rng = loaded("clip_mha").model, np.random.default_rng(0)
  projector = model.params[adapter.PROJECTOR]
  num_features = projector["linear_1"]["weight"].shape[1]
  features = jnp.asarray(rng.normal(size=(5, num_features + 3)), jnp.float32)
  wider = adapter.widen(projector, num_features + 3)
  np.testing.assert_allclose(project(model, wider, features), project(model, projector, features[:, :-3]), atol=1e-5)
  assert adapter.widen(projector, num_features) is projector


def test_alignment_adds_characters_to_what_a_projector_says(loaded, monkeypatch):
  """Of three kinds of patches two show a character: their image tokens move by its embedding, the others stay."""
  monkeypatch.setattr(align, "STEPS", 400)
  monkeypatch.setattr(align, "PATCHES_A_STEP", 512)
  model, rng = loaded("clip_mha").model, np.random.default_rng(0)
  base = model.params[adapter.PROJECTOR]
  kinds = rng.normal(size=(3, base["linear_1"]["weight"].shape[1]))
  shown = rng.integers(0, 3, 4000)
  features = (kinds[shown] + 0.05 * rng.normal(size=(4000, kinds.shape[1]))).astype(np.float32)
  labels = np.eye(3, 2, dtype=np.float32)[shown]
  embeddings = rng.normal(size=(2, base["linear_2"]["bias"].shape[0])).astype(np.float32)
  as_is = Whitening(jnp.zeros(features.shape[1]), jnp.eye(features.shape[1]))
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # in Optax
    fitted = align.add(model, align.Patches(features, labels, as_is), embeddings, base, [0, 1], seed=0)
  moved = np.asarray(project(model, fitted, features) - project(model, base, features))
  for kind, expected in enumerate((*embeddings, 0.0)):
    np.testing.assert_allclose(moved[shown == kind].mean(0), expected, atol=0.25)
  apart = embeddings[0] - embeddings[1]
  assert (np.sign(moved @ apart)[shown < 2] == np.where(shown[shown < 2], -1, 1)).all()


def project(model, projector, features):
  bound = model.replace(params={adapter.PROJECTOR: projector}).bind()
  return bound.multi_modal_projector(jnp.asarray(features)[None])[0]


def test_adapters_average():
  adapters = [{"linear": {"weight": jnp.full(3, value)}} for value in (2.0, 6.0)]
  mean = adapter.average(adapters, [0.25, 0.75])
  np.testing.assert_array_equal(mean["linear"]["weight"], [5, 5, 5])


def test_packed_questions_see_the_prefix_and_themselves():
  segments = jnp.asarray([[0, 0, 1, 1, 2, 2, UNUSED]])
  batch = Batch(None, segments, None, None, None, None)
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


@pytest.fixture(scope="module")
def samples(images):
  return [
    Sample(images[0], [("what is it?", "a cat"), ("how many?", "3"), ("where?", "left")]),
    Sample(images[1], [("is it red?", "no")]),
  ]


@pytest.fixture(scope="module")
def load(loaded, checkpoints, tmp_path_factory):
  """Loads a tiny model whose text holds the image tokens, or reads them by cross-attention."""

  def load(name):
    if name != "cross":
      return loaded(name)
    directory = tiny_cross.make(checkpoints("dinov2"), tmp_path_factory.mktemp("cross")).directory
    return checkpoint.load(str(directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))

  return functools.cache(load)


def packer_of(tiny, question_slots):
  return Packer(tiny, tiny.prompts().image_shape[0], question_slots)


answer_logits = jax.jit(adapter.answer_logits)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["clip_mha", "cross"])
def test_packed_answers_are_predicted_as_one_by_one(load, samples, name):
  tiny = load(name)
  batch = packer_of(tiny, 160).pack(samples)
  logits = np.asarray(answer_logits(tiny.model, {}, batch))
  processor, tokenizer = tiny.prompts(), tiny.processor.tokenizer
  forward = jax.jit(lambda model, inputs: model.bind()(inputs))

  batcher = Batcher(512, processor.blank, [ImageBucket(1, processor.num_image_tokens)], buckets=(160,))
  for row, sample in enumerate(samples):
    for number, (question, answer) in enumerate(sample.questions):
      example = processor.prepare([sample.picture], question)
      expected_answer = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
      last, count = len(example.tokens), len(expected_answer)
      tokens = np.array([*example.tokens, *expected_answer], np.int32)
      answered = dataclasses.replace(
        example,
        tokens=tokens,
        image_id=np.pad(example.image_id, (0, count), constant_values=-1),
        positions=np.append(example.positions, example.positions[-1] + 1 + np.arange(count, dtype=np.int32)),
      )
      inputs = jax.tree.map(
        jnp.asarray, batcher.pack([answered], bucket=Bucket(1, processor.num_image_tokens, 160), batch_size=1)
      )
      alone = np.asarray(forward(tiny.model, inputs))[0, last - 1 : last + count - 1]
      mine = np.asarray(batch.answer_valid[row] & (batch.answer_question[row] == number))
      assert np.asarray(batch.answers)[row][mine].tolist() == expected_answer
      np.testing.assert_allclose(logits[row][mine], alone, atol=1e-4)
  assert int(batch.answer_valid.sum()) == sum(len(answer) + 1 for sample in samples for _, answer in sample.questions)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["clip_mha", "cross"])
def test_updates_are_those_of_merged_weights(load, samples, name):
  tiny = load(name)
  batch = packer_of(tiny, 160).pack(samples)
  decoder = tiny.model.params["language_model"]
  cross_layers = tiny.config.text.cross_attention_layers
  cross = adapter.init_cross(decoder, trained({"cross_attention_layers": cross_layers}))
  assert len(cross) == 7 * len(cross_layers)
  lora = adapter.init_lora(jax.random.key(0), decoder, rank=2, without=cross)
  assert len(lora) == 7 * tiny.config.text.num_hidden_layers - 2 * len(cross_layers)
  lora = jax.tree.map(lambda x: x + 0.1, lora)
  merged = jax.tree.map(lambda x: x, tiny.model.params)
  for path, update in lora.items():
    layer = functools.reduce(dict.__getitem__, path.split("/"), merged)
    layer["weight"] = layer["weight"] + adapter.LORA_SCALE * update["b"] @ update["a"]
  expected = answer_logits(tiny.model.replace(params=merged), {}, batch)
  same = Adapter(tiny.model.params["multi_modal_projector"], lora, cross).params(tiny.model.params)
  jax.tree.map(np.testing.assert_array_equal, same, tiny.model.params)
  np.testing.assert_allclose(answer_logits(tiny.model, lora, batch), expected, atol=2e-3)


@pytest.mark.parametrize("slots, message", [(8, "more than 8 slots"), (40, "do not fit into 20 slots")])
def test_questions_that_do_not_fit_are_refused(loaded, images, slots, message):
  with pytest.raises(UserError, match=message):
    packer_of(loaded("clip_mha"), slots).pack([Sample(images[0], [("?", "a long answer indeed")])])


def test_gradients_of_pytorch_and_jax_are_equal(loaded, checkpoints, samples, monkeypatch):
  monkeypatch.setattr(torch_gradients, "BLOCK", 64)
  tiny = loaded("dinov2")
  batch = packer_of(tiny, 160).pack(samples)
  lora = adapter.init_lora(jax.random.key(0), tiny.model.params["language_model"], rank=2)
  own = Adapter(tiny.model.params["multi_modal_projector"], jax.tree.map(lambda x: x + 0.1, lora))
  own = own.replace(projector=jax.tree.map(lambda x: 1.1 * x, own.projector))
  in_torch = TorchGradients(checkpoints("dinov2").directory, own, dtype="float32", compiled=False)
  (loss, right, grads), (expected_loss, expected_right, expected) = (
    in_torch(own, batch),
    jax_gradients(tiny.model)(own, batch),
  )
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  np.testing.assert_allclose(right, expected_right, rtol=1e-6)
  size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-5 * size), grads, expected)
  again = in_torch(own, batch)[2]
  jax.tree.map(np.testing.assert_array_equal, again, grads)


# The command, with a tiny model and few pictures


class FewPictures:
  """As `data.Mixture`, from one picture of every kind of thing, one of a shape and noise."""

  def __init__(self, shares):
    assert shares == Shares(scene=0.5)
    self.shares = shares

  def names(self):
    return ["cat"]

  def draw_shape(self, rng):
    picture = Image.new("RGB", (64, 64), (255, 255, 255))
    picture.paste((200, 0, 0), (10, 10, 30, 40))
    return picture, Pool([("what shape?", "circle")], [], [])

  def draw_scene(self, rng):
    scene = scenes.compose(rng, self.cutouts)
    writing = np.zeros_like(scene.instances)
    writing[:200, :200] = ord("7")
    return scene._replace(writing=writing)

  def draw(self, num_pictures, *, seed):
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)) for _ in range(num_pictures)]
    return [Sample(picture, [("what is it?", "a cat"), ("how many?", "3")]) for picture in pictures]


@pytest.fixture
def command(checkpoints, monkeypatch, tmp_path):
  """Runs the training of a recipe of three parts, and returns the files that it wrote."""
  Image.new("RGBA", (60, 50), (200, 30, 40, 255)).save(tmp_path / "thing.png")
  things = [Cutout(tmp_path / "thing.png", kind, None, None) for kind in KINDS]
  monkeypatch.setattr(FewPictures, "cutouts", things, raising=False)
  monkeypatch.setattr(training, "Mixture", FewPictures)
  for plan in ("FROM_SCRATCH", "ADDING"):
    monkeypatch.setattr(align, plan, align.Plan(16, 2))
  monkeypatch.setattr(align, "STEPS", 3)
  narrow = checkpoints("dinov2").directory
  wide = layouts.copy_of(narrow, tmp_path / "wide", change=twice_as_wide, fields={"vision_feature_layer": [-2, 1]})
  monkeypatch.setattr(
    train, "assemble", lambda *_, feature_layers, **__: {(11,): narrow, (11, 6): wide}[feature_layers]
  )
  side, rates, shares = 28, Rates(1e-2, 1e-2, 1e-2), Shares(scene=0.5)
  first = Part("1", 3, (Stage(side, 3, 1, 100),), rates, shares, rank=2)
  second = Part("2", 4, (Stage(side, 3, 1, 100),), rates, shares, {"1": 1.0})
  third = Part("3", 5, (Stage(side, 1, 1, 100),), rates, shares, {"1": 0.25, "2": 0.75}, feature_layers=(11, 6))
  recipe = Recipe((first, second, third), {"3": 1.0})

  def run(workdir, recipe=recipe, **values):
    monkeypatch.setitem(RECIPES, "demo", recipe)
    named = {"model": "demo", "dtype": "float32", "gradients": "jax", "save_every": 2, "workdir": str(workdir)}
    given = types.SimpleNamespace(**named | {"adapter": str(workdir.with_suffix(".safetensors"))} | values)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # in Optax
      assert train.run(given) == 0
    written = {path.name: path.read_bytes() for path in sorted(workdir.glob("*.safetensors"))}
    return written | {"result.safetensors": workdir.with_suffix(".safetensors").read_bytes()}

  run.recipe = recipe
  return run


def twice_as_wide(tensors):
  """Tensors of a checkpoint whose projector reads twice as many features."""
  (name,) = [name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight")]
  return tensors | {name: np.tile(tensors[name], (1, 2))}


def check_start(projectors, work):
  """The third part reads more features: what it starts from is the mean's projector, and nothing of the others."""
  mean = adapter.average([Adapter.read(work / f"{part}.safetensors") for part in "12"], [0.25, 0.75])
  (own,) = (projector["linear_1"]["weight"] for projector in projectors)
  expected, width = mean.projector["linear_1"]["weight"], own.shape[1] // 2
  assert expected.shape[1] == width
  np.testing.assert_allclose(own[:, :width], expected, atol=2e-3)
  np.testing.assert_allclose(own[:, width:], 0, atol=2e-3)
  found = Adapter.read(work.with_suffix(".safetensors"))
  assert found.projector["linear_1"]["weight"].shape == own.shape
  assert jax.tree.structure(found.lora) == jax.tree.structure(mean.lora)


def test_an_interrupted_training_continues_as_if_it_had_not_been(command, tmp_path, monkeypatch):
  started, add = [], align.add

  def recorded(model, patches, embeddings, base, *args, **kwargs):
    started.append(patches.whitening.fold(base))
    return add(model, patches, embeddings, base, *args, **kwargs)

  monkeypatch.setattr(align, "add", recorded)
  whole = command(tmp_path / "whole")
  check_start(started, tmp_path / "whole")
  assert list(whole) == ["1.safetensors", "2.safetensors", "3.safetensors", "result.safetensors"]
  assert whole["result.safetensors"] == whole["3.safetensors"] and len(set(whole.values())) == 3
  taken, drawn = [], FewPictures.draw

  def stop(self, *args, seed, **kwargs):
    taken.append(seed)
    if len(taken) in (3, 8):
      raise KeyboardInterrupt
    return drawn(self, *args, seed=seed, **kwargs)

  monkeypatch.setattr(FewPictures, "draw", stop)
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      command(tmp_path / "parts")
  assert command(tmp_path / "parts") == whole
  assert taken == [(3, 0), (3, 1), (3, 2), (3, 2), (4, 0), (4, 1), (4, 2), (5, 0), (5, 0)]  # what is done stays
  first, second, third = command.recipe.parts
  other = Recipe((first, dataclasses.replace(second, seed=9), third), command.recipe.result)
  with pytest.raises(UserError, match="seed.*use another --workdir"):
    command(tmp_path / "parts", other)
  with pytest.raises(UserError, match="dtype.*use another --workdir"):
    command(tmp_path / "parts", dtype="bfloat16")
  with pytest.raises(UserError, match="name a file outside of --workdir"):
    command(tmp_path / "parts", adapter=str(tmp_path))


def test_recipes_start_from_earlier_parts():
  for recipe in RECIPES.values():
    known = set()
    for part in recipe.parts:
      assert part.start.keys() <= known and (not part.start or sum(part.start.values()) == 1)
      assert part.shares.scene + part.shares.detail <= 1
      known.add(part.name)
    assert recipe.result.keys() <= known and sum(recipe.result.values()) == 1
  demo = RECIPES["demo"].parts
  assert [sum(stage.steps for stage in part.stages) for part in demo] == [1040, 750, 600, 240, 2700, 2400]
  assert [part.feature_layers for part in demo] == [(11,)] * 4 + [(11, 6)] * 2
