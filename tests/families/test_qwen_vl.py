"""Qwen-VL-Chat against transformers' Qwen2 and a slow tower and resampler in torch: prompts, features, logits, tokens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_qwen
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from checkpoints_convert.errors import CheckpointError
from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.inputs import Images

QUESTIONS = ("What is it?", "Why <image> so?", "A <ref>dog</ref> or <|im_end|>?", "And a question that is longer, no?")
TOLERANCE = 1e-4
INPUTS = InputConfig("chat", prompt_buckets=(160,), batch_size=4)
SHARES = (0.5, 0.1875)
GENERATION = GenerationConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_qwen.make(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  mesh = sharding.make_mesh(data=4)
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"), mesh=mesh)


@pytest.fixture(scope="module")
def examples(loaded, images):
  processor = loaded.prompts("chat")
  return [processor.prepare([image], question) for image, question in zip(images, QUESTIONS, strict=True)]


def encoded(text, ids):
  """Token ids of ASCII text by the tiny vocabulary, longest merge first; `ids` are those of special tokens."""
  vocabulary = {token.decode(): 256 + rank for rank, token in enumerate(tiny_qwen.MERGES)} | ids
  found = []
  while text:
    token = next((t for t in sorted(vocabulary, key=len, reverse=True) if text.startswith(t)), text[0])
    found.append(vocabulary[token] if token in vocabulary else ord(token))
    text = text[len(token) :]
  return found


def special_ids(tiny):
  start = tiny.image_id - 2
  return {"<img>": start, "</img>": start + 1, "<ref>": start - 6, "</ref>": start - 5}


class TestPrompts:
  def test_a_chat_is_the_authors(self, tiny, loaded, examples):
    end = 256 + len(tiny_qwen.MERGES)
    for question, example in zip(QUESTIONS, examples, strict=True):
      picture = "Picture 1: <img>@</img>\n"
      content = question.replace("<image>", picture) if "<image>" in question else picture + question
      head, tail = encoded(content.replace("<|im_end|>", "\0"), special_ids(tiny)), encoded("<|im_end|>", {})
      head = [t for token in head for t in (tail if token == 0 else [token])]  # a user's own <|im_end|> is plain text
      at = head.index(ord("@"))
      head[at : at + 1] = [tiny.image_id] * tiny_qwen.NUM_QUERIES
      system = encoded("system\nYou are a helpful assistant.", {})
      expected = [end + 1, *system, end + 2, *encoded("\n", {}), end + 1, *encoded("user\n", {}), *head, end + 2]
      expected += [*encoded("\n", {}), end + 1, *encoded("assistant\n", {})]
      assert example.tokens.tolist() == expected
      assert np.flatnonzero(example.image_id == 0).tolist() == np.flatnonzero(example.tokens == tiny.image_id).tolist()
    text = loaded.prompts("chat").prompt("Why?")
    assert text.endswith("user\nPicture 1: <img><imgpad></img>\nWhy?<|im_end|>\n<|im_start|>assistant\n")

  def test_pictures_of_a_chat_are_numbered(self, tiny, loaded, images):
    processor, user = loaded.prompts("chat"), encoded("user\n", {})
    for question, text in (
      ("Which?", "Picture 1: <img>@</img>\nPicture 2: <img>@</img>\nWhich?"),
      ("<image>Is it <image>?", "Picture 1: <img>@</img>\nIs it Picture 2: <img>@</img>\n?"),
    ):
      example, expected = processor.prepare(images[:2], question), []
      for token in encoded(text, special_ids(tiny)):
        expected += [tiny.image_id] * tiny_qwen.NUM_QUERIES if token == ord("@") else [token]
      tokens = example.tokens.tolist()
      start = next(n for n in range(len(tokens)) if tokens[n : n + len(user)] == user) + len(user)
      assert tokens[start : start + len(expected)] == expected
      assert example.image_id.tolist().count(0) == example.image_id.tolist().count(1) == tiny_qwen.NUM_QUERIES
    mme = loaded.prompts("mme").prompt("Which?", 2)
    assert mme == "<img><imgpad></img>\n<img><imgpad></img>\nWhich?"

  @pytest.mark.parametrize(
    ("template", "text"),
    [
      ("vqa", "<img>@</img>Why? Answer:"),
      ("caption", "<img>@</img>Why?"),
      ("mme", "<img>@</img>\nWhy?"),
      ("Q: {question}\\n<image>A:", "Q: Why?\n<img>@</img>A:"),
    ],
  )
  def test_evaluation_prompts(self, tiny, loaded, images, template, text):
    tokens = loaded.prompts(template).prepare([images[0]], "Why?").tokens.tolist()
    at = encoded(text, special_ids(tiny)).index(ord("@"))
    assert tokens[at : at + tiny_qwen.NUM_QUERIES] == [tiny.image_id] * tiny_qwen.NUM_QUERIES
    tokens[at : at + tiny_qwen.NUM_QUERIES] = [ord("@")]
    assert tokens == encoded(text, special_ids(tiny))

  def test_pictures_are_squashed(self, loaded, images):
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    for image in images:
      square = np.asarray(image.resize((tiny_qwen.SIDE,) * 2, Image.Resampling.BICUBIC), np.float64) / 255
      expected = ((square - mean) / std).transpose(2, 0, 1)
      np.testing.assert_allclose(loaded.prompts().prepare([image], "Why?").images.pixels[0], expected, atol=1e-5)

  def test_answers_end_with_a_message_or_the_text(self, loaded):
    end = 256 + len(tiny_qwen.MERGES)
    assert loaded.eos_token_ids == (end, end + 1, end + 2)
    assert loaded.prompts().decode([ord("a"), end + 2]) == "a"

  @pytest.mark.parametrize(
    ("question", "message"),
    [
      ("<image> or <image>?", "needs one <image> for each picture, but this one has 2 for 1 picture"),
      ("What is <img>?", "may not hold <img>"),
    ],
  )
  def test_bad_questions(self, loaded, images, question, message):
    with pytest.raises(UserError, match=message):
      loaded.prompts().prepare([images[0]], question)

  def test_an_unknown_template_lists_those_there_are(self, loaded):
    with pytest.raises(UserError, match="must be chat, vqa, caption, mme, or a text with one <image>"):
      loaded.prompts("vicuna_v1")


def test_image_features(tiny, loaded, examples):
  pixels = np.concatenate([example.images.pixels for example in examples])
  with torch.no_grad():
    expected = tiny.visual(torch.from_numpy(pixels)).numpy()
  actual, tower = jax.jit(lambda model, x: model.bind().encode_images(x)[:2])(
    loaded.model, Images(jnp.asarray(pixels)[:, None])
  )
  assert actual.shape == (4, tiny_qwen.NUM_QUERIES, tiny_qwen.HIDDEN) and tower.class_attention is None
  np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


def test_logits_at_every_position(tiny, loaded, examples):
  processor = loaded.prompts()
  batcher = Batcher(512, processor.blank, [ImageBucket(1, 16)], buckets=(160,))
  batch = jax.tree.map(jnp.asarray, batcher.pack(examples, bucket=Bucket(1, 16, 160), batch_size=4))
  actual = jax.jit(lambda model, inputs: model.bind()(inputs))(loaded.model, batch)
  for row, example in zip(actual, examples, strict=True):
    expected = tiny.logits(torch.from_numpy(example.tokens).long(), torch.from_numpy(example.images.pixels))
    np.testing.assert_allclose(row[: len(example.tokens)], expected, atol=TOLERANCE, rtol=0)


class TestPruning:
  def test_himap_is_the_slow_one(self, tiny, loaded, examples, images):
    """Rows of one picture and one of three, whose shares are of its own image tokens."""
    schedule, question = loaded.schedule("himap", (1, 3), SHARES), "<image> or <image> before <image>?"
    pictures, questions = [*images, images[1:]], [*QUESTIONS, question]
    answers = generate(loaded, pictures, questions, schedule=schedule, generation=GENERATION, inputs=INPUTS)
    examples = [*examples, loaded.prompts().prepare(images[1:], question)]
    for example, answer in zip(examples, answers, strict=True):
      keep = tuple(round(share * example.num_image_tokens) for share in SHARES)
      for number, token in enumerate(answer.token_ids):  # decoding is running the pruned sequence again
        kept, logits = slow_himap(tiny, example, (1, 3), keep, answer.token_ids[:number])
        assert answer.kept == kept and token == logits.argmax()
        if number == 0:
          np.testing.assert_allclose(answer.first_logits, logits, atol=TOLERANCE, rtol=0)

  @pytest.mark.sampled(of="meshes")
  def test_a_row_alone_and_on_a_mesh(self, tiny, loaded, images, tmp_path):
    schedule = loaded.schedule("himap", (1, 3), SHARES)
    together = generate(loaded, images, QUESTIONS, schedule=schedule, generation=GENERATION, inputs=INPUTS)
    alone = generate(loaded, images[2:3], QUESTIONS[2:3], schedule=schedule, generation=GENERATION, inputs=INPUTS)
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    spread = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=2, tensor=4))
    on_mesh = generate(spread, images, QUESTIONS, schedule=schedule, generation=GENERATION, inputs=INPUTS)
    for answer, other in [(together[2], alone[0]), *zip(together, on_mesh, strict=True)]:
      assert (answer.token_ids, answer.kept) == (other.token_ids, other.kept)
      np.testing.assert_allclose(answer.first_logits, other.first_logits, atol=TOLERANCE, rtol=0)

  @pytest.mark.parametrize("method", ["fastervlm", "visionzip", "vispruner", "prumerge"])
  def test_methods_that_need_a_class_token_list_those_that_do_not(self, loaded, method):
    with pytest.raises(UserError, match=f"{method}.*himap"):
      loaded.schedule(method)


@torch.no_grad()
def slow_himap(tiny, example, prune_layers, keep, answered):
  """HiMAP layer by layer on one prompt and the tokens answered so far.

  Gives the kept image tokens after each stage, and the last token's logits.
  """
  ids = torch.cat([torch.from_numpy(example.tokens).long(), torch.tensor(answered, dtype=torch.long)])
  pixels, num_prompt = torch.from_numpy(example.images.pixels), len(example.tokens)
  x, positions = tiny.embed(ids, pixels)[None], torch.arange(len(ids))
  image = torch.from_numpy(np.flatnonzero(example.tokens == tiny.image_id))
  model, kept, attention, whole = tiny.language_model.model, [], None, image
  for index, layer in enumerate(model.layers):
    if index in prune_layers:
      is_image = torch.isin(positions, image)
      after = (positions > image.max()) & (positions < num_prompt)
      rows = after if index == prune_layers[0] else is_image
      scores = attention[0].mean(dim=0)[rows].sum(dim=0)[is_image]
      chosen = scores.argsort(descending=True, stable=True)[: keep[prune_layers.index(index)]].sort().values
      image = image[chosen]
      kept.append(torch.searchsorted(whole, image).tolist())
      remains = ~is_image | torch.isin(positions, image)
      x, positions = x[:, remains], positions[remains]
    rotation = model.rotary_emb(x, positions[None])
    mask = torch.full((x.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    y, attention = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotation, attention_mask=mask)
    x = x + y
    x = x + layer.mlp(layer.post_attention_layernorm(x))
  return kept, tiny.language_model.lm_head(model.norm(x))[0, -1]


def changed(tiny, target, *, visual=None, **fields):
  target.mkdir()
  for path in tiny.directory.iterdir():
    (target / path.name).write_bytes(path.read_bytes())
  config = json.loads((target / "config.json").read_text())
  (target / "config.json").write_text(json.dumps(config | fields | {"visual": config["visual"] | (visual or {})}))
  return target


class TestBadCheckpoints:
  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"visual": {"n_queries": 15}}, "n_queries is 15, not a square number"),
      ({"visual": {"n_queries": 25}}, r"mis-shaped \(transformer.visual.attn_pool.\w+ is \[16, 256\], expected \[25"),
      ({"visual": {"output_dim": 128}}, "visual.output_dim is 128; supported: 256"),
      ({"visual": {"heads": 8}, "rotary_pct": 0.5}, "rotary_pct is 0.5; supported: 1"),
      ({"vision_config": {}}, "vision_config beside visual; the fields are of two model families"),
      ({"num_hidden_layers": 3}, r"unexpected \(transformer.h.3"),
    ],
  )
  def test_config(self, tiny, tmp_path, fields, message):
    directory = changed(tiny, tmp_path / "qwen", **fields)
    with pytest.raises(ValueError, match=message) as error:
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)
    assert "\n" not in str(error.value)

  def test_without_a_tower(self, tiny, tmp_path):
    directory = changed(tiny, tmp_path / "qwen")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "visual"}))
    with pytest.raises(UserError, match="Qwen without a vision tower is not supported"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)

  @pytest.mark.parametrize("change", [lambda text: text[:300], lambda text: text[:-3], lambda text: text + "????\n"])
  def test_a_vocabulary_that_is_cut_short(self, tiny, tmp_path, change):
    directory = changed(tiny, tmp_path / "qwen")
    (directory / "qwen.tiktoken").write_text(change((directory / "qwen.tiktoken").read_text()))
    with pytest.raises(UserError, match=r"qwen.tiktoken: not (the|a) complete .*download it again"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)

  def test_a_fused_tensor_of_another_shape(self, tiny, tmp_path):
    directory = changed(tiny, tmp_path / "qwen")
    tensors = load_file(directory / "model.safetensors")
    for name, match in (
      ("transformer.h.0.attn.c_attn.weight", r"mis-shaped \(transformer.h.0.attn.c_attn.weight is \[766, 256\]"),
      (
        "transformer.visual.transformer.resblocks.0.attn.in_proj.weight",
        r"mis-shaped \(\S*in_proj.weight is \[94, 32\]",
      ),
    ):
      save_file(tensors | {name: tensors[name][:-2]}, directory / "model.safetensors")
      with pytest.raises(CheckpointError, match=match):
        checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)

  def test_a_prompt_beyond_the_context(self, loaded, images):
    with pytest.raises(UserError, match="the model's context leaves room for"):
      generate(loaded, images[:1], ["long " * 200], generation=GENERATION, inputs=INPUTS)


def test_converted_and_read_again(tiny, loaded, tmp_path):
  from checkpoints_convert import convert

  target = convert.convert(
    convert.open_source(str(tiny.directory)), tmp_path / "target", checkpoint.describe, cache_dir=tmp_path
  )
  again = checkpoint.load(str(target), dtype=jnp.float32, cache_dir=tmp_path)
  same = jax.tree.map(
    lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), again.model.params, loaded.model.params
  )
  assert all(jax.tree.leaves(same)) and again.eos_token_ids == loaded.eos_token_ids
  assert again.prompts().prompt("Why?") == loaded.prompts().prompt("Why?")


def test_as_published_in_pickled_shards(tiny, loaded, tmp_path):
  """The layout of Qwen/Qwen-VL-Chat: `.bin` shards and their index."""
  directory = changed(tiny, tmp_path / "qwen")
  (directory / "model.safetensors").unlink()
  tensors = list(tiny_qwen.authors_names(tiny.language_model, tiny.visual).items())
  weight_map = {}
  for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
    file = f"pytorch_model-{number:05d}-of-00002.bin"
    torch.save(dict(part), directory / file)
    weight_map |= dict.fromkeys(dict(part), file)
  (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  with pytest.raises(CheckpointError, match="--allow_pickle"):
    checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)
  again = checkpoint.load(str(directory), dtype=jnp.float32, cache_dir=tmp_path, allow_pickle=True)
  same = jax.tree.map(
    lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), again.model.params, loaded.model.params
  )
  assert all(jax.tree.leaves(same))
