"""Gemma 3 against transformers: prompts, pictures, features, logits, tokens; and HiMAP against transformers' own layers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_restore
import tiny_checkpoints
import tiny_gemma3
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from experiments.flow import tokens as flow_tokens
from experiments.flow.decoder import first_logits, weigh
from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.engine.engine import Engine
from himap_jax.families import from_hf
from himap_jax.families.family import Message
from himap_jax.inputs import PADDING, Images

N = tiny_gemma3.NUM_IMAGE_TOKENS
TOLERANCE = 1e-4
INPUTS = InputConfig("chat", prompt_buckets=(128,), batch_size=4)
LAYERS, KEEP = (3, 5), (0.5, 0.25)  # after a layer with full attention, and after one with a window
GENERATION = GenerationConfig(max_new_tokens=6, ignore_eos=True)
# The number of pictures of each question.
QUESTIONS = (
  (1, "What is it?"),
  (3, "Is <image> as <image>, or as <image> a picture of the same, dear model?"),
  (0, "A question about nothing at all."),
  (2, "Which one?"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_gemma3.make(tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pictures(images):
  return [[images[(row + place) % 4] for place in range(count)] for row, (count, _) in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def examples(loaded, pictures):
  processor = loaded.prompts("chat")
  return [processor.prepare(own, question) for own, (_, question) in zip(pictures, QUESTIONS, strict=True)]


def answer(loaded, pictures, questions, schedule):
  return generate(loaded, pictures, questions, schedule=schedule, generation=GENERATION, inputs=INPUTS)


def test_pictures_of_a_caller_may_have_any_mode(loaded, images, monkeypatch):
  """Processors of published checkpoints do not convert them."""
  monkeypatch.setattr(loaded.processor.image_processor, "do_convert_rgb", None)
  grey, clear = images[0].convert("L"), images[0].convert("RGBA")
  clear.putalpha(0)
  own = [[grey], [grey.convert("RGB")], [clear], [Image.new("RGB", clear.size, "white")]]
  answers = generate(loaded, own, ["Why?"] * 4, generation=GenerationConfig(1), inputs=INPUTS)
  first, second, third, fourth = (answer.first_logits for answer in answers)
  np.testing.assert_allclose(first, second, atol=1e-6)
  np.testing.assert_allclose(third, fourth, atol=1e-6)
  assert np.abs(first - third).max() > 1e-3
  with pytest.raises(UserError, match="^images.1.: floating-point samples are not supported$"):
    generate(loaded, [grey, Image.new("F", (8, 8))], ["Why?"] * 2, inputs=INPUTS)


class TestPrompts:
  @pytest.mark.parametrize(
    ("count", "messages"),
    [
      (1, [("user", "What is it? ")]),
      (2, [("user", "Is <image> like <image>?")]),
      (2, [("system", "Be brief."), ("user", "<image>What?"), ("assistant", "A dog."), ("user", "<image>And now?")]),
      (0, [("user", "Hello")]),
    ],
  )
  def test_text_ids_and_pixels_are_those_of_transformers(self, tiny, loaded, images, count, messages):
    conversation = []
    for role, text in messages:
      parts = text.split("<image>")
      content = [{"type": "image"}] * count if len(parts) == 1 and role == "user" else []
      for number, part in enumerate(parts):
        content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": part}] * bool(part)
      conversation.append({"role": role, "content": content})
    text = tiny.processor.apply_chat_template(conversation, add_generation_prompt=True)
    batch = tiny.processor(images=images[:count] or None, text=text, return_tensors="np", add_special_tokens=False)
    question = [Message(*message) for message in messages]
    assert loaded.prompts().prompt(question, count) == text
    example = loaded.prompts().prepare(images[:count], question)
    assert example.tokens.tolist() == batch["input_ids"][0].tolist()
    np.testing.assert_array_equal(example.image_id >= 0, example.tokens == tiny.model.config.image_token_id)
    if count:
      np.testing.assert_allclose(example.images.pixels, batch["pixel_values"], atol=1e-6)

  def test_a_literal_template(self, tiny, loaded, images):
    processor = loaded.prompts("Q: {question}\\n<image>A:")
    batch = tiny.processor(images=images[:1], text="Q: Why?\n<start_of_image>A:", return_tensors="np")
    assert processor.prepare(images[:1], "Why?").tokens.tolist() == batch["input_ids"][0].tolist()

  def test_size_is_known_from_headers(self, loaded):
    processor, rng = loaded.prompts(), np.random.default_rng(0)
    sizes = [tuple(map(int, rng.integers(1, 90, 2))) for _ in range(10)]
    for count in (0, 1, 3, 10):
      own = [tiny_checkpoints.noise_image(size, 0) for size in sizes[:count]]
      assert processor.image_size(sizes[:count]) == processor.prepare(own, "Why?").size == (count, count * N)

  def test_image_tokens_form_a_grid(self, loaded, examples):
    views = loaded.prompts().views(examples[1])
    assert [view.picture.size for view in views] == [(48, 48)] * 3
    assert [view.tokens.tolist() for view in views] == np.arange(3 * N).reshape(3, 4, 4).tolist()
    assert loaded.prompts().places(examples[1])[N + 6].tolist() == [1, 0, 1, 2]
    assert loaded.prompts().patch_grid == (4, 4)

  @pytest.mark.parametrize(
    ("count", "question", "message"),
    [
      (1, "<image> or <image>?", "needs one <image> for each picture, but this one has 2 for 1 picture"),
      (1, "What is <start_of_image>?", "a question may not hold <start_of_image>, <end_of_image>, <image_soft_token>"),
      (
        1,
        [Message("user", "<image>Why?"), Message("user", "So?")],
        r"chat template cannot hold these messages \(roles must alternate\)",
      ),
    ],
  )
  def test_bad_questions(self, loaded, images, count, question, message):
    with pytest.raises(UserError, match=message):
      loaded.prompts().prepare(images[:count], question)

  def test_more_pictures_than_the_context_holds(self, loaded, images):
    with pytest.raises(UserError, match="context of 512 tokens does not hold 640 image tokens and 6 new ones"):
      answer(loaded, [images[:1] * 40], ["Why?"], loaded.schedule("none"))


def test_image_features(tiny, loaded, examples):
  pixels = examples[1].images.pixels
  with torch.no_grad():
    expected = tiny.model.get_image_features(torch.from_numpy(pixels)).pooler_output

  @jax.jit
  def encode(model, images):
    tokens, tower = model.bind().encode_images(images)[:2]
    return tokens, tower, model.bind().multi_modal_projector(tower.features)

  actual, tower, projected = encode(loaded.model, Images(jnp.asarray(pixels)[None]))
  np.testing.assert_allclose(actual[0], expected.reshape(3 * N, -1), atol=TOLERANCE, rtol=0)
  assert tower.class_attention is None and tower.features.shape[:2] == tower.keys.shape[:2] == (1, 3 * N)
  np.testing.assert_allclose(projected, actual, atol=1e-6)  # so that methods can project merged features


@pytest.fixture(scope="module")
def batch(loaded, examples):
  """The rows with pictures in one ragged batch, the last row twice."""
  batcher = Batcher(512, loaded.prompts().blank, [ImageBucket(3, 3 * N, is_ragged=True)], buckets=(128,))
  own = [example for example in examples if example.num_images]
  return batcher.pack(own, bucket=batcher.buckets[0], batch_size=4)


def test_logits_at_every_position(tiny, loaded, examples, batch):
  """Transformers makes the masks: of full and sliding layers, with one, two and three pictures."""
  actual = jax.jit(lambda model, inputs: model.bind()(inputs))(loaded.model, batch)
  for row, example in zip(actual, (example for example in examples if example.num_images), strict=False):
    tokens, pixels = torch.from_numpy(example.tokens).long(), torch.from_numpy(example.images.pixels)
    np.testing.assert_allclose(row[: len(tokens)], tiny_gemma3.logits(tiny, tokens, pixels), atol=TOLERANCE, rtol=0)


def test_studies_use_the_model_s_attention(loaded, batch):
  """Logits with (unedited) edits in a sliding and in a full layer, and the pairs between image tokens."""

  @jax.jit
  def logits(model, inputs):
    embedded = model.bind().embed(inputs)
    edited = first_logits(model, embedded, {0: weigh, 2: weigh})
    return edited, model.bind()(inputs), flow_tokens.block(embedded.layout, "image→image")

  edited, plain, pairs = logits(loaded.model, batch)
  last = (batch.layout.kind != PADDING).sum(axis=1) - 1
  np.testing.assert_allclose(edited, plain[np.arange(4), last], atol=TOLERANCE, rtol=0)
  image_id = np.asarray(batch.layout.image_id)
  for row, own in zip(pairs, image_id, strict=True):
    slot = np.arange(len(own))
    expected = (own[:, None] >= 0) & (own >= 0) & ((slot < slot[:, None]) | (own[:, None] == own))
    np.testing.assert_array_equal(row, expected & (slot != slot[:, None]))


class TestPruning:
  @pytest.mark.parametrize(("method", "rows", "restore"), [("himap", (2,), False), ("himap", (1,), True)])
  def test_rows_of_no_and_several_pictures(self, tiny, loaded, examples, pictures, method, rows, restore):
    """Kept sets, logits and tokens are those of the slow version; decoding is running the pruned sequence again."""
    layers, keep = (LAYERS, KEEP) if method == "himap" else ((), ())
    schedule = loaded.schedule(method, layers or None, keep or None, restore=restore)
    answers = answer(loaded, [pictures[row] for row in rows], [QUESTIONS[row][1] for row in rows], schedule)
    for example, found in zip([examples[row] for row in rows], answers, strict=True):
      stages = {layer: round(share * example.num_image_tokens) for layer, share in zip(layers, keep, strict=True)}
      for number, token in enumerate(found.token_ids):
        kept, logits = slow(tiny, example, stages, found.token_ids[:number], restore=restore)
        assert token == logits[-1].argmax() and len(found.token_ids) == 6
        assert found.kept == kept or not example.num_images
        if number == 0:
          np.testing.assert_allclose(found.first_logits, logits[-1], atol=TOLERANCE, rtol=0)

  @pytest.mark.sampled(of="meshes")
  def test_a_ragged_batch_on_a_mesh(self, tiny, loaded, examples, batch, tmp_path):
    opened = checkpoint.open_checkpoint(str(tiny.directory), cache_dir=tmp_path)
    spread = opened.restore(dtype=jnp.float32, mesh=sharding.make_mesh(data=2, tensor=4))
    found = Engine(spread.model, loaded.schedule("himap", LAYERS, KEEP), GENERATION)(batch, range(4))
    for row, example in enumerate(example for example in examples if example.num_images):
      stages = {layer: round(share * example.num_image_tokens) for layer, share in zip(LAYERS, KEEP, strict=True)}
      for number, token in enumerate(found.tokens[row]):
        kept, logits = slow(tiny, example, stages, found.tokens[row][:number])
        assert token == logits[-1].argmax() and [stage[row] for stage in found.kept] == kept
        if number == 0:
          np.testing.assert_allclose(found.logits[row], logits[-1], atol=TOLERANCE, rtol=0)

  def test_layers_that_do_not_update_image_tokens(self, tiny, loaded, examples, pictures):
    schedule = loaded.schedule("shortv", (0, 2, 4))
    (found,) = answer(loaded, pictures[1:2], [QUESTIONS[1][1]], schedule)
    _, logits = slow(tiny, examples[1], frozen=(0, 2, 4))
    np.testing.assert_allclose(found.first_logits, logits[-1], atol=TOLERANCE, rtol=0)

  @pytest.mark.parametrize("method", ["cdpruner"])
  def test_methods_before_the_decoder(self, loaded, pictures, images, method):
    schedule = loaded.schedule(method, None, (0.5,))
    together = answer(loaded, [pictures[0], images[2:3]], [QUESTIONS[0][1], "Why?"], schedule)
    (alone,) = answer(loaded, pictures[:1], [QUESTIONS[0][1]], schedule)
    assert (alone.token_ids, alone.kept) == (together[0].token_ids, together[0].kept) and len(alone.kept[0]) == N // 2

  @pytest.mark.parametrize("method", ["fastervlm", "visionzip", "vispruner", "prumerge"])
  def test_methods_that_need_a_class_token_list_those_that_do_not(self, loaded, method):
    with pytest.raises(UserError, match=f"{method}.*himap"):
      loaded.schedule(method)


@torch.no_grad()
def slow(tiny, example, stages=None, answered=(), frozen=(), restore=False):
  """One prompt and the tokens answered so far, layer by layer; `stages` are the counts of HiMAP's two.

  Gives the kept image tokens after each stage, and the logits of the tokens that reach the last layer.
  """
  model, num_prompt, stages = tiny.model.model.language_model, len(example.tokens), stages or {}
  ids = torch.cat([torch.from_numpy(example.tokens).long(), torch.tensor(answered, dtype=torch.long)])
  x, positions = model.embed_tokens(ids), torch.arange(len(ids))
  block = torch.cat([torch.from_numpy(example.image_id), torch.full((len(answered),), -1)])
  whole = torch.nonzero(block >= 0)[:, 0]
  if len(whole):
    x[whole] = tiny.model.get_image_features(torch.from_numpy(example.images.pixels)).pooler_output.flatten(0, 1)
  kept, maps = [], []
  for index, (layer, kind) in enumerate(zip(model.layers, model.config.layer_types, strict=True)):
    if index in stages and len(whole):
      is_image = block >= 0
      instruction = (positions > whole[-1]) & (positions < num_prompt)
      score = maps[-1][instruction if not kept else is_image].sum(dim=0)[is_image]
      stays = positions[is_image][score.argsort(descending=True, stable=True)[: stages[index]]].sort().values
      kept.append(torch.searchsorted(whole, stays).tolist())
      remains = ~is_image | torch.isin(positions, stays)
      x, positions, block = x[remains], positions[remains], block[remains]
    seen = (positions[:, None] >= positions) | ((block[:, None] == block) & (block >= 0))
    if kind == "sliding_attention":
      seen &= positions[:, None] - positions < tiny_gemma3.WINDOW
    hook = layer.self_attn.register_forward_hook(lambda module, inputs, output: maps.append(output[1][0].mean(dim=0)))
    rotation = model.rotary_emb(x[None], positions[None], kind)
    mask = torch.zeros(seen.shape)
    if restore and kept:
      counts = [len(whole), *map(len, kept)]
      angles = positions[:, None].double() * getattr(model.rotary_emb, f"{kind}_inv_freq").double()
      count = counts[-2] / counts[-1] if index in stages else 1
      mask = reference_restore.gain(reference_restore.closeness(angles), block >= 0, positions < num_prompt, count)
    mask = mask.masked_fill(~seen, -torch.inf)[None, None]
    y = layer(x[None], position_embeddings=rotation, attention_mask=mask)[0]
    hook.remove()
    x = torch.where((block >= 0)[:, None], x, y) if index in frozen else y
  return kept, tiny.model.lm_head(model.norm(x))


def changed(tiny, target, *, file="config.json", text=None, drop=(), **fields):
  """A copy of the checkpoint with other fields in a file."""
  target.mkdir()
  for path in tiny.directory.iterdir():
    (target / path.name).write_bytes(path.read_bytes())
  config = json.loads((target / file).read_text()) | fields
  if text is not None:
    config["text_config"] = {name: value for name, value in config["text_config"].items() if name not in drop} | text
  config = {name: value for name, value in config.items() if name not in drop}
  (target / file).write_text(json.dumps(config))
  return target


class TestBadCheckpoints:
  @pytest.mark.parametrize(
    ("fields", "message"),
    [
      ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text'; supported: 'llava'"),
      ({"drop": ("mm_tokens_per_image",)}, "no mm_tokens_per_image, the number of image tokens"),
      ({"mm_tokens_per_image": 15}, "mm_tokens_per_image is 15, not a square number"),
      ({"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9, but 8 x 8 patches cannot be averaged to 3 x 3"),
      (
        {"text": {"sliding_window_pattern": 0}, "drop": ("layer_types",)},
        "sliding_window_pattern is 0; needed: a whole number",
      ),
      ({"text": {"layer_types": ["full_attention"] * 5}}, "layer_types must name .* for each of num_hidden_layers"),
      ({"text": {"layer_types": ["chunked_attention"] * 6}}, "must name sliding_attention or full_attention"),
      ({"text": {"sliding_window": None}}, "sliding_window is None, not a number of tokens"),
      ({"text": {"final_logit_softcapping": 30.0}}, r"soft caps of logits \(final_logit_softcapping\)"),
      ({"text": {"attn_logit_softcapping": 50.0}}, r"soft caps of logits \(attn_logit_softcapping\)"),
      ({"text": {"use_bidirectional_attention": True}}, "use_bidirectional_attention.* is not supported"),
      ({"text": {"model_type": "llama"}}, "language model 'llama' is not supported; supported: gemma3_text"),
      ({"vision_config": {"model_type": "clip_vision_model"}}, "tower 'clip_vision_model' is not supported"),
      ({"image_token_index": 5}, "has the id 5 in config.json, but <image_soft_token> has 7 in the tokenizer"),
      ({"file": "preprocessor_config.json", "do_pan_and_scan": True}, "crops of long pictures .do_pan_and_scan"),
      ({"file": "preprocessor_config.json", "size": {"height": 36, "width": 36}}, "36 x 36 pixels, .* reads 48 x 48"),
    ],
  )
  def test_files(self, tiny, tmp_path, fields, message):
    directory = changed(tiny, tmp_path / "gemma3", **fields)
    with pytest.raises(ValueError, match=message) as error:
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
    assert "\n" not in str(error.value)

  def test_a_matrix_of_another_shape(self, tiny, tmp_path):
    directory = changed(tiny, tmp_path / "gemma3")
    tensors, name = load_file(directory / "model.safetensors"), "multi_modal_projector.mm_input_projection_weight"
    save_file(tensors | {name: tensors[name][:-1]}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is \[31, 48\], read as \[48, 31\], expected \[48, 32\]"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)


def test_converted_and_read_again(tiny, loaded, tmp_path):
  from checkpoints_convert import convert

  source = convert.open_source(str(tiny.directory))
  target = convert.convert(source, tmp_path / "target", checkpoint.describe, cache_dir=tmp_path)
  again = checkpoint.load(str(target), dtype=jnp.float32, cache_dir=tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again.model.params, loaded.model.params)
  assert (again.config, again.eos_token_ids) == (loaded.config, loaded.eos_token_ids) == (loaded.config, (1, 4))
  assert again.prompts().prompt("Why?") == loaded.prompts().prompt("Why?")


@pytest.mark.parametrize(
  "names",
  [
    {"vision_tower.": "vision_tower.vision_model."},  # as published
    {"language_model.model.": "model.language_model.", "vision_tower.": "model.vision_tower.vision_model."}
    | {"multi_modal_projector.": "model.multi_modal_projector."},
  ],
)
def test_names_of_other_versions(tiny, tmp_path, names):
  directory = changed(tiny, tmp_path / "gemma3")
  tensors = load_file(directory / "model.safetensors")
  tensors = {name.replace("vision_model.", ""): x for name, x in tensors.items()}
  for start, other in names.items():
    tensors = {name.replace(start, other, 1): x for name, x in tensors.items()}
  assert all(any(name.startswith(other) for name in tensors) for other in names.values())
  save_file(tensors, directory / "model.safetensors")
  checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path)


def test_as_published():
  """The fields of google/gemma-3-4b-it's config.json."""
  text = {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "sliding_window": 1024}
  vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
  fields = {
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": text | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "vision_config": vision | {"image_size": 896, "patch_size": 14},
  }
  config = from_hf(fields)
  full = [layer for layer in range(34) if config.text.window(layer) is None]
  assert full == [5, 11, 17, 23, 29] and config.text.window(0) == 1024
  assert [(own.theta, own.factor) for own in map(config.text.rope_of, (0, 5))] == [(1e4, 1), (1e6, 8)]
  assert config.text.within(300).rope_of(0).theta == 1e4 and config.text.within(300).window(0) is None
  assert (config.text.query_scale, config.vision.pool, config.num_image_tokens(896, 896)) == (1, 4, 256)
  text |= {"num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 168}  # as in the 27B
  assert from_hf(fields | {"text_config": text}).text.query_scale == pytest.approx((128 / 168) ** 0.5)
