"""Llama-3.2-Vision against transformers: prompts, features, logits, tokens, and pruning of cross keys, float32."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import tiny_mllama
import torch
from safetensors.torch import save_file

from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.engine.engine import Engine
from himap_jax.families import from_hf
from himap_jax.families.family import Message
from himap_jax.pruning.methods import METHODS
from himap_jax.run.drawing import draw_kept

N, TOLERANCE, NUM_NEW = tiny_mllama.N, 1e-4, 6
QUESTIONS = (
  "What is it?",
  "A <image> was <image> or <image> then?",
  "Who wrote this?",
  "<image><image>Is <image> one?",
)
NUM_PICTURES = (1, 3, 0, 3)
INPUTS = InputConfig("chat", prompt_buckets=(80,), batch_size=2)
GENERATION = GenerationConfig(NUM_NEW, ignore_eos=True)
WORK = ("divprune", "fastv", "instruction_attention", "none", "pyramiddrop", "random", "uniform", "visipruner")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_mllama.make(tmp_path_factory.mktemp("mllama"))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pictures():
  """The pictures of every question: of four, three, two and one tile."""
  sizes = [(40, 40), (20, 80), (50, 25), (28, 20)]
  own = [tiny_checkpoints.noise_image(size, seed) for seed, size in enumerate(sizes)]
  return [[own[(row + place) % 4] for place in range(count)] for row, count in enumerate(NUM_PICTURES)]


@pytest.fixture(scope="module")
def examples(loaded, pictures):
  return [loaded.prompts().prepare(own, text) for own, text in zip(pictures, QUESTIONS, strict=True)]


@pytest.fixture(scope="module")
def encoded(tiny, loaded, pictures):
  """Transformers' own inputs."""
  prompts = [loaded.prompts().prompt(text, len(own)) for own, text in zip(pictures, QUESTIONS, strict=True)]
  return [tiny.encode(own, prompt) for own, prompt in zip(pictures, prompts, strict=True)]


class TestPrompts:
  def test_tokens_and_tiles_are_the_reference_s(self, examples, encoded):
    for example, batch, count in zip(examples, encoded, NUM_PICTURES, strict=True):
      is_text = example.image_id < 0
      assert example.tokens[is_text].tolist() == batch["input_ids"][0].tolist()
      assert example.positions[is_text].tolist() == list(range(is_text.sum()))
      assert np.unique(example.image_id, return_counts=True)[1][1:].tolist() == [N] * count
      if count:
        np.testing.assert_allclose(example.images.pixels, batch["pixel_values"][0].flatten(0, 1), atol=1e-5)
        assert (example.images.coordinates[:, 0] >= 0).tolist() == batch["aspect_ratio_mask"].bool().ravel().tolist()

  def test_messages_are_the_template_s(self, tiny, loaded, pictures):
    question = [
      Message("user", "Is <image> it?"),
      Message("assistant", "No."),
      Message("user", "<image> Or this?"),
    ]
    image, text = {"type": "image"}, lambda own: {"type": "text", "text": own}
    expected = [
      {"role": "user", "content": [text("Is "), image, text(" it?")]},
      {"role": "assistant", "content": [text("No.")]},
      {"role": "user", "content": [image, text(" Or this?")]},
    ]
    prompt = tiny.processor.apply_chat_template(expected, add_generation_prompt=True)
    assert loaded.prompts().prompt(question, 2) == prompt
    tokens = loaded.prompts().prepare(pictures[1][:2], question)
    batch = tiny.encode(pictures[1][:2], prompt)
    assert tokens.tokens[tokens.image_id < 0].tolist() == batch["input_ids"][0].tolist()

  def test_a_literal_template(self, tiny, loaded, pictures):
    example = loaded.prompts("<image>{question} It").prepare(pictures[0], "Why?")
    batch = tiny.encode(pictures[0], "<|image|>Why? It")
    assert example.tokens[example.image_id < 0].tolist() == batch["input_ids"][0].tolist()

  @pytest.mark.parametrize(
    "size", [(1, 1), (28, 28), (29, 28), (57, 28), (28, 85), (200, 3), (97, 101), (3, 200), (1, 10_000), (640, 480)]
  )
  def test_sizes(self, tiny, loaded, size):
    picture, processor = tiny_checkpoints.noise_image(size, 0), loaded.prompts()
    example = processor.prepare([picture], "Why?")
    batch = tiny.encode([picture], processor.prompt("Why?"))
    assert processor.image_size([size]) == example.size == (4, N)
    np.testing.assert_allclose(example.images.pixels, batch["pixel_values"][0, 0], atol=1e-5)
    rows, columns = from_hf(json.loads((tiny.directory / "config.json").read_text())).vision.tiling.arrangements[
      batch["aspect_ratio_ids"].item() - 1
    ]
    assert (example.images.coordinates[:, 1:].max(axis=0) + 1).tolist() == [rows, columns]

  def test_where_image_tokens_are(self, loaded, examples):
    example, processor = examples[1], loaded.prompts()
    views, places = processor.views(example), processor.places(example)
    assert [view.tokens.shape for view in views] == [(12, 4), (4, 8), (4, 4)]
    assert places.shape == (3 * N, 4) and (places[:, 2] >= 0).sum() == sum(view.tokens.size for view in views)
    for number, view in enumerate(views):
      assert view.picture.size == (view.tokens.shape[1] * 7, view.tokens.shape[0] * 7)
      for (row, column), token in np.ndenumerate(view.tokens):
        tile = row // 4 * (view.tokens.shape[1] // 4) + column // 4
        assert places[token].tolist() == [number, tile, row % 4, column % 4]
    assert places[0].tolist() == [0, 0, -1, -1] and places[N + 3 * 17].tolist() == [-1] * 4
    draw_kept(views, [[*range(3 * N)], [0, N]])

  @pytest.mark.parametrize(
    ("question", "message"),
    [
      ("What is <|image|>?", "may not hold <|image|>; <image> stands for the picture"),
      ("<image> or <image>?", "but this one has 2 for 1 picture"),
      ([Message("critic", "Bad.")], "the chat template cannot hold these messages .no critics"),
    ],
  )
  def test_bad_questions(self, loaded, pictures, question, message):
    with pytest.raises(UserError, match=message):
      loaded.prompts().prepare(pictures[0], question)


def packed(loaded, rows, bucket):
  batcher = Batcher(512, loaded.prompts().blank, [ImageBucket(bucket.num_tiles, bucket.num_image_tokens)])
  return jax.tree.map(jnp.asarray, batcher.pack(rows, bucket=bucket, batch_size=len(rows)))


def test_image_features_and_logits_at_every_position(tiny, loaded, examples, encoded):
  """Rows of one and three pictures in one batch, before, between and after which text stands, and one of none."""

  @jax.jit
  def program(model, inputs):
    network = model.bind()
    return network.encode_images(inputs.images)[0] if len(inputs.images.pixels[0]) else inputs.tokens, network(inputs)

  for rows, bucket in (([0, 1, 3], Bucket(12, 3 * N, 80, True)), ([2], Bucket(0, 0, 150))):
    batch = packed(loaded, [examples[row] for row in rows], bucket)
    features, logits = jax.device_get(program(loaded.model, batch))
    for own, found, row in zip(features, logits, rows, strict=True):
      with torch.no_grad():
        expected = tiny.model(**encoded[row]).logits[0]
        if NUM_PICTURES[row]:
          vision = {name: encoded[row][name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
          states = tiny.model.model.vision_model(**vision).last_hidden_state
          states = tiny.model.model.multi_modal_projector(states).flatten(0, 3)
          np.testing.assert_allclose(own[: len(states)], states, atol=TOLERANCE, rtol=0)
      is_text = examples[row].image_id < 0
      np.testing.assert_allclose(found[: len(is_text)][is_text], expected, atol=TOLERANCE, rtol=0)


def answers_of(loaded, pictures, rows, method, layers, shares):
  schedule, questions = loaded.schedule(method, layers, shares), [QUESTIONS[row] for row in rows]
  own = [pictures[row] for row in rows]
  return generate(loaded, own, questions, schedule=schedule, generation=GENERATION, inputs=INPUTS)


class TestPruning:
  @pytest.mark.parametrize(
    ("method", "layers", "shares", "rows"),
    [
      ("instruction_attention", (2, 4), (0.25, 0.05), (0, 1, 2, 3)),
      ("pyramiddrop", (3, 5), (0.2, 0.05), (1, 3)),
      ("visipruner", (4,), (0.125,), (1, 3)),
    ],
  )
  def test_is_the_slow_one(self, tiny, loaded, pictures, encoded, method, layers, shares, rows):
    """Also in rows whose first pictures are dropped altogether, since the question does not read them."""
    for row, answer in zip(rows, answers_of(loaded, pictures, rows, method, layers, shares), strict=True):
      if not NUM_PICTURES[row]:
        own = dict(encoded[row]) | {"cross_attention_mask": None}
        expected = tiny.model.generate(**own, max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None)
        assert answer.token_ids == expected[0, own["input_ids"].shape[1] :].tolist()
        assert answer.kept == [[]] * len(layers)
        continue
      stages = {layer: round(share * NUM_PICTURES[row] * N) for layer, share in zip(layers, shares, strict=True)}
      for number, token in enumerate(answer.token_ids):  # decoding is running the pruned sequence again
        slow = tiny_mllama.slow_pruned(tiny, encoded[row], stages, answer.token_ids[:number], method)
        assert slow.margin > 1e-5, "so close that rounding decides; draw other weights"
        assert answer.kept == slow.kept and token == slow.logits[-1].argmax()
        if not number:
          np.testing.assert_allclose(answer.first_logits, slow.logits[-1], atol=TOLERANCE, rtol=0)

  def test_a_row_is_as_alone(self, tiny, loaded, pictures, encoded):
    """And the reference without the other image tokens gives the same logits, also if they never reach the decoder."""
    method, layers, shares = "divprune+fastv", (0, 2), (0.3, 0.1)
    together = answers_of(loaded, pictures, (1, 3), method, layers, shares)
    assert [len(stage) for stage in together[0].kept] == [round(3 * N * share) for share in shares]
    (alone,) = answers_of(loaded, pictures, (3,), method, layers, shares)
    assert (alone.kept, alone.token_ids) == (together[1].kept, together[1].token_ids)
    for answer, batch in zip(together, (encoded[1], encoded[3]), strict=True):
      first, *rest = answer.kept
      later = [[first.index(token) for token in own] for own in rest]
      given = {layers[0]: first} | dict(zip(layers[1:], later, strict=True))
      slow = tiny_mllama.slow_pruned(tiny, batch, given, [], "given")
      np.testing.assert_allclose(answer.first_logits, slow.logits[-1], atol=TOLERANCE, rtol=0)

  @pytest.mark.sampled(of="meshes")
  def test_rows_of_different_numbers_of_image_tokens_on_a_mesh(self, tiny, loaded, pictures, examples, tmp_path):
    method, shares = ("instruction_attention", (2, 4)), (0.25, 0.05)
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    spread = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=2, tensor=4))
    batch = jax.tree.map(np.asarray, packed(loaded, examples[:2], Bucket(12, 3 * N, 80, True)))
    found = Engine(spread.model, loaded.schedule(*method, shares), GENERATION)(batch, [0, 1])
    for row, alone in enumerate(answers_of(loaded, pictures, (0, 1), *method, shares)):
      np.testing.assert_allclose(found.logits[row], alone.first_logits, atol=TOLERANCE, rtol=0)
      assert ([stage[row] for stage in found.kept], found.tokens[row]) == (alone.kept, alone.token_ids)

  @pytest.mark.parametrize("method", sorted(METHODS.keys() - set(WORK)))
  def test_methods_without_meaning_list_those_with(self, loaded, method):
    with pytest.raises(UserError, match=f"method '{method}' reads .*methods that work: {', '.join(WORK)}$"):
      loaded.schedule(method)

  @pytest.mark.parametrize(
    ("method", "layers", "message"),
    [
      ("fastv", (1,), "before layer 1: it reads the attention of layers 0 to 0, and .* in layers 1, 3, 5"),
      ("instruction_attention", (2, 3), "before layer 3: it reads the attention of layers 2 to 2"),
      ("divprune+fastv", (0, 1), "before layer 1"),
      ("pyramiddrop", (2,), "before layer 2: it reads the attention of layers 2 to 2"),
    ],
  )
  def test_stages_without_attention(self, loaded, method, layers, message):
    with pytest.raises(UserError, match=message):
      loaded.schedule(method, layers, (0.5, 0.25)[: len(layers)])


class TestBadInput:
  @pytest.mark.parametrize("layers", [[9], [3, 1], [1, 1], [-1], [], "3", [1.5], 3])
  def test_cross_attention_layers(self, layers):
    text = tiny_mllama.TEXT | {"cross_attention_layers": layers}
    with pytest.raises(UserError, match="config.json: cross_attention_layers must") as error:
      from_hf({"model_type": "mllama", "vision_config": tiny_mllama.VISION, "text_config": text})
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize(
    ("vision", "message"),
    [
      ({"vision_output_dim": 64}, "vision_output_dim is 64; needed: 96"),
      ({"intermediate_layers_indices": [0, 4]}, "needed: layers from 0 to 3"),
      ({"image_size": [28, 35]}, "image_size is .*; needed: one number"),
      ({"supported_aspect_ratios": [[1, 1], [2, 3]]}, "at most max_num_tiles .4. tiles"),
    ],
  )
  def test_tower(self, vision, message):
    with pytest.raises(UserError, match=message):
      from_hf({"model_type": "mllama", "vision_config": tiny_mllama.VISION | vision, "text_config": tiny_mllama.TEXT})

  def test_more_pictures_than_the_context_holds(self, loaded, pictures):
    with pytest.raises(UserError, match="context of 512 tokens does not hold 544 image tokens"):
      generate(loaded, [pictures[0] * 8], ["Why?"], generation=GENERATION, inputs=INPUTS)

  def test_a_limit_of_image_tokens(self, loaded):
    with pytest.raises(UserError, match=f"makes {N} image tokens of every picture; --max_image_tokens has no effect"):
      loaded.prompts("chat", 34)

  def test_an_image_processor_of_other_tiles(self, tiny, tmp_path):
    shutil.copytree(tiny.directory, tmp_path / "model")
    path = tmp_path / "model" / "processor_config.json"
    path.write_text(path.read_text().replace(": 28", ": 35"))
    with pytest.raises(UserError, match="makes up to 4 tiles of 35 pixels, and config.json describes 4 of 28"):
      checkpoint.open_checkpoint(str(tmp_path / "model"), cache_dir=tmp_path).prompts()


def test_converted_and_read_again(tiny, loaded, tmp_path):
  from checkpoints_convert import convert

  source = convert.open_source(str(tiny.directory))
  target = convert.convert(source, tmp_path / "target", checkpoint.describe, cache_dir=tmp_path)
  again = checkpoint.load(str(target), dtype=jnp.float32, cache_dir=tmp_path)
  same = jax.tree.map(
    lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), again.model.params, loaded.model.params
  )
  assert all(jax.tree.leaves(same))
  assert again.prompts().prompt("Why?") == loaded.prompts().prompt("Why?")


def test_as_published(tiny, loaded, tmp_path):
  """With an image processor and a chat template in files of their own, and with the names of transformers' modules."""
  directory = tmp_path / "model"
  shutil.copytree(tiny.directory, directory)
  images = json.loads((directory / "processor_config.json").read_text())["image_processor"]
  (directory / "preprocessor_config.json").write_text(
    json.dumps(images | {"image_processor_type": "MllamaImageProcessor"})
  )
  (directory / "chat_template.json").write_text(json.dumps({"chat_template": tiny_mllama.CHAT_TEMPLATE}))
  (directory / "processor_config.json").unlink()
  (directory / "chat_template.jinja").unlink()
  save_file(
    {name: tensor.contiguous() for name, tensor in tiny.model.state_dict().items()}, directory / "model.safetensors"
  )
  assert "model.language_model.layers.1.cross_attn.q_norm.weight" in tiny.model.state_dict()
  again = checkpoint.load(str(directory), dtype=jnp.float32, cache_dir=tmp_path)
  same = jax.tree.map(
    lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), again.model.params, loaded.model.params
  )
  assert all(jax.tree.leaves(same))
  assert again.prompts().prompt("Why?") == loaded.prompts().prompt("Why?")
