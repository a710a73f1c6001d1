"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers: pixels, prompts, positions, features, logits, tokens, HiMAP."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_restore
import tiny_checkpoints
import tiny_qwen2_vl
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.vision_utils import get_vision_window_index

from checkpoints_convert import convert
from experiments.shared import geometries
from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket
from himap_jax.families import from_hf
from himap_jax.families.qwen2_vl import grid_coordinates
from himap_jax.generation import make_batcher
from himap_jax.model.network import abstract_params
from himap_jax.model.towers.qwen2_vl import window_of

TOLERANCE = 1e-4
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# No picture, one, two between words, and three. The last two rows share a bucket.
QUESTIONS = ("What?", "Where is the dog?", "Is <image> the same as <image> here?", "<image><image> or <image>, which?")
NUM_NEW, TEXT = 4, 160
GENERATION = GenerationConfig(NUM_NEW, ignore_eos=True)
INPUTS = InputConfig("chat", (TEXT,), batch_size=4)
SHARES = ((1, 2), (0.5, 0.25))  # the second before the layer whose output gets the third of Qwen3-VL's injections


@pytest.fixture(scope="module", params=tiny_qwen2_vl.SPECS)
def tiny(request, tmp_path_factory):
  return tiny_qwen2_vl.make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(tiny, tmp_path_factory):
  """On a mesh of eight devices."""
  mesh, cache_dir = sharding.make_mesh(data=4, tensor=2), tmp_path_factory.mktemp("cache")
  return checkpoint.load(str(tiny.directory), dtype=jnp.float32, cache_dir=cache_dir, mesh=mesh)


@pytest.fixture(scope="module")
def rows(images):
  """The pictures of each question."""
  tall = images[2].transpose(Image.Transpose.ROTATE_90)
  return [[], images[1:2], [images[2], tall], [images[3], images[1], images[0]]]


@pytest.fixture(scope="module")
def encoded(tiny, rows):
  return [tiny.encode(own, chat(text, len(own))) for own, text in zip(rows, QUESTIONS, strict=True)]


def chat(text, num_pictures):
  text = text.replace("<image>", PICTURE) if "<image>" in text else PICTURE * num_pictures + text
  system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
  return f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def positions_of(tiny, inputs):
  """transformers' own rotary positions, `[3, S]`."""
  known = {name: inputs[name] for name in ("input_ids", "mm_token_type_ids")}
  return tiny.model.model.get_rope_index(**known, image_grid_thw=inputs.get("image_grid_thw"))[0][:, 0]


def test_prompts_pixels_and_positions(tiny, loaded, rows, encoded):
  processor = loaded.prompts()
  for own, question, expected in zip(rows, QUESTIONS, encoded, strict=True):
    assert processor.prompt(question, len(own)) == chat(question, len(own))
    example = processor.prepare(own, question)
    assert example.tokens.tolist() == expected["input_ids"][0].tolist()
    assert example.positions.T.tolist() == positions_of(tiny, expected).tolist()
    assert processor.image_size([image.size for image in own]) == example.size
    if own:
      frames = expected["pixel_values"].reshape(len(example.images.pixels), 3, 2, -1)
      for frame in (0, 1):
        np.testing.assert_array_equal(example.images.pixels, frames[:, :, frame].flatten(1))


def test_image_size_is_that_of_the_prepared_picture(loaded):
  processor = loaded.prompts("<image>{question}")
  for seed, size in enumerate([(8, 8), (5, 9), (200, 30), (31, 33), (90, 91), (3, 300), (57, 12), (16, 100), (44, 44)]):
    example = processor.prepare([tiny_checkpoints.noise_image(size, seed)], "?")
    assert processor.image_size([size]) == example.size
  for limit in (4, 9, 30):
    limited = loaded.prompts("<image>{question}", limit)
    for size in ((40, 40), (60, 90), (300, 100)):
      example = limited.prepare([tiny_checkpoints.noise_image(size, 0)], "?")
      assert limited.image_size([size]) == example.size and example.num_image_tokens <= limit
  assert loaded.prompts("<image>{question}", 10_000).image_size([(90, 91)]) == processor.image_size([(90, 91)])


def test_counts_are_not_checked_where_no_picture_could_be_read(loaded):
  batcher = make_batcher(loaded, loaded.prompts(), {}, (64,), 4, loaded.schedule("fastv", (2,), (20,)))
  assert batcher.most_image_tokens < 20


def test_views_and_places(loaded, rows):
  processor = loaded.prompts()
  example = processor.prepare(rows[3], "Which?")
  views, places = processor.views(example), processor.places(example)
  assert [view.picture.size for view in views] == [(32, 32), (48, 24), (32, 32)]
  assert [view.tokens.shape for view in views] == [(4, 4), (3, 6), (4, 4)]
  assert np.concatenate([view.tokens.ravel() for view in views]).tolist() == list(range(example.num_image_tokens))
  assert places[16 + 7].tolist() == [1, 0, 1, 1]
  resized = np.asarray(rows[3][0].resize((32, 32), 3), np.int32)
  assert np.abs(resized - np.asarray(views[0].picture, np.int32)).max() <= 1


def test_features_and_logits_at_every_position(tiny, loaded, rows, encoded):
  """In one padded batch."""
  processor = loaded.prompts()
  examples = [processor.prepare(own, text) for own, text in zip(rows, QUESTIONS, strict=True)]
  patches, tokens = (max(example.size[axis] for example in examples) for axis in (0, 1))
  bucket = Bucket(patches + 8, tokens + 2, TEXT, True)
  batcher = Batcher(512, processor.blank, [ImageBucket(*bucket[:2], True)], buckets=(TEXT,))
  batch = jax.tree.map(jnp.asarray, batcher.pack(examples, bucket=bucket, batch_size=4))
  run = jax.jit(lambda model, inputs: (model.bind().encode_images(inputs.images)[0], model.bind()(inputs)))
  features, logits = run(loaded.model, batch)
  assert np.isfinite(features).all() and np.isfinite(logits).all()
  for row, inputs in enumerate(encoded):
    with torch.no_grad():
      expected = tiny.model(**inputs).logits[0]
      np.testing.assert_allclose(logits[row, : len(expected)], expected, atol=TOLERANCE, rtol=0)
      if "pixel_values" in inputs:
        expected = tiny.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        expected = torch.cat(list(expected))
        np.testing.assert_allclose(features[row, : len(expected)], expected, atol=TOLERANCE, rtol=0)


def test_himap_is_the_slow_one(tiny, loaded, rows, encoded):
  """Rows of no, two and three pictures in one call, each as alone; without pictures nothing is pruned."""
  assert loaded.eos_token_ids == (2, 0)
  schedule, chosen = loaded.schedule("himap", *SHARES), (0, 2, 3)
  pictures, questions = zip(*((rows[row], QUESTIONS[row]) for row in chosen), strict=True)
  answers = generate(loaded, pictures, questions, schedule=schedule, generation=GENERATION, inputs=INPUTS)
  for inputs, answer in zip([encoded[row] for row in chosen], answers, strict=True):
    for number, token in enumerate(answer.token_ids):  # decoding is running the pruned sequence again
      kept, logits = slow_himap(tiny, inputs, answer.token_ids[:number])
      assert token == logits.argmax()
      if not number:
        assert answer.kept == kept
        np.testing.assert_allclose(answer.first_logits, logits, atol=TOLERANCE, rtol=0)


@pytest.mark.sampled
def test_before_the_decoder_positions_stay(tiny, loaded, rows, encoded):
  """A stage before layer 0 keeps the positions of the tokens along all axes; in Qwen3-VL, with RESTORE."""
  restore = bool(loaded.config.vision.deepstack_layers)
  schedule = loaded.schedule("divprune", (0,), (0.5,), restore=restore)
  answers = generate(loaded, rows[1:2], QUESTIONS[1:2], schedule=schedule, generation=GENERATION, inputs=INPUTS)
  _, logits = slow_himap(tiny, encoded[1], [], given=answers[0].kept[0], restore=restore)
  np.testing.assert_allclose(answers[0].first_logits, logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def slow_himap(tiny, inputs, answered, given=None, *, restore=False):
  """HiMAP with transformers' layers on one prompt and the tokens answered so far, or with image tokens `given`.

  Of RESTORE it knows a stage before the decoder.

  Gives the kept image tokens after each stage, and the last token's logits.
  """
  model, num_prompt = tiny.model.model, inputs["input_ids"].shape[1]
  answered = torch.tensor([answered], dtype=torch.long)
  ids = torch.cat([inputs["input_ids"], answered], dim=1)
  types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answered)], dim=1)
  rotary = positions_of(tiny, inputs | {"input_ids": ids, "mm_token_type_ids": types})
  x, order, image, deep = model.get_input_embeddings()(ids), torch.arange(ids.shape[1]), torch.tensor([]), []
  if "pixel_values" in inputs:
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    image = (types[0] == 1).nonzero()[:, 0]
    x[0, image] = torch.cat(list(features.pooler_output))
    deep = [torch.cat(list(own)) for own in getattr(features, "deepstack_features", None) or []]
  whole, kept, attention = image, [], None
  stages = dict(zip(*SHARES, strict=True)) if given is None else {0: None}
  for index, layer in enumerate(model.language_model.layers):
    if index in stages and len(whole):
      is_image = torch.isin(order, image)
      if given is None:
        after = (order > image.max()) & (order < num_prompt)
        scores = attention[0].mean(dim=0)[after if index == SHARES[0][0] else is_image].sum(dim=0)[is_image]
        count = max(1, round(stages[index] * len(whole)))
        image = image[scores.argsort(descending=True, stable=True)[:count].sort().values]
      else:
        image = whole[given]
      kept.append(torch.searchsorted(whole, image).tolist())
      remains = ~is_image | torch.isin(order, image)
      x, order = x[:, remains], order[remains]
    elif index in stages:
      kept.append([])
    rotation = model.language_model.rotary_emb(x, rotary[:, None, order])
    seen = order if given is None or restore else torch.arange(len(order))  # a decoder without the others has no gaps
    distance, window = seen[:, None] - seen[None], getattr(layer.self_attn, "sliding_window", None) or len(ids[0])
    mask = torch.zeros(distance.shape)
    if restore and len(whole):
      count = len(whole) / len(image) if index == 0 else 1
      mask = reference_restore.gain(closeness(model, rotation), torch.isin(order, image), order < num_prompt, count)
    mask = mask.masked_fill((distance < 0) | (distance >= window), float("-inf"))[None, None]
    y, attention = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotation, attention_mask=mask)
    x = x + y
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    if index < len(deep):
      x[0, torch.isin(order, image)] += deep[index][torch.searchsorted(whole, image)]
  return kept, tiny.model.lm_head(model.language_model.norm(x))[0, -1]


def closeness(model, rotation):
  """RESTORE's D from transformers' own cosines and sines, `[1, S, H]`, or of every axis, which share the features."""
  if rotation[0].ndim == 4:
    sections = model.language_model.config.rope_parameters["mrope_section"] * 2
    parts = ([own[index % 3] for index, own in enumerate(x.split(sections, dim=-1))] for x in rotation)
    rotation = [torch.cat(own, dim=-1) for own in parts]
  turned = torch.cat(list(rotation), dim=-1)[0].double()
  return turned @ turned.T / rotation[0].shape[-1]


def changed(tiny, target, **files):
  """A copy of the checkpoint with other fields in JSON files, by their stems; None removes a field."""
  shutil.copytree(tiny.directory, target)
  for stem, fields in files.items():
    path = target / f"{stem}.json"
    own = (json.loads(path.read_text()) if path.exists() else {}) | fields
    path.write_text(json.dumps({name: value for name, value in own.items() if value is not None}))
  return target


class TestFiles:
  def test_names_with_and_without_model(self, tiny, loaded, tmp_path):
    """As several versions of transformers write them; and converted."""
    directory = changed(tiny, tmp_path / "renamed")
    tensors, renamed = load_file(directory / "model.safetensors"), {}
    for name, tensor in tensors.items():
      if name.startswith("model.visual."):
        name = name.removeprefix("model.")
      elif name.startswith("visual."):
        name = f"model.{name}"
      elif name.startswith("model.") and "language_model" not in name:
        name = name.replace("model.", "model.language_model.", 1)
      renamed[name] = tensor
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    source = convert.open_source(str(directory))
    target = convert.convert(source, tmp_path / "converted", checkpoint.describe, cache_dir=tmp_path)
    again = checkpoint.load(str(target), dtype=jnp.float32, cache_dir=tmp_path)
    equal = jax.tree.map(
      lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), again.model.params, loaded.model.params
    )
    assert all(jax.tree.leaves(equal))
    assert again.prompts().prompt("Why?") == loaded.prompts().prompt("Why?")

  def test_the_published_forms_of_settings(self, tiny, loaded, tmp_path):
    """A flat config.json, pixels under their old names, and the processor's own chat template."""
    fields = json.loads((tiny.directory / "config.json").read_text())
    if loaded.config.vision.model_type != "qwen3_vl_vision":
      fields |= fields.pop("text_config") | {"model_type": fields["model_type"]}
    rope = fields if "rope_parameters" in fields else fields["text_config"]
    own = rope.pop("rope_parameters")
    rope |= {"rope_theta": own["rope_theta"], "rope_scaling": {**own, "type": "mrope"}}
    if loaded.config.vision.model_type != "qwen3_vl_vision":
      del rope["rope_scaling"]["rope_type"]
    assert from_hf(fields) == loaded.config
    pixels = {"size": None, "min_pixels": 100, "max_pixels": 1000}
    template = {"chat_template": "{{ messages[0]['content'][0]['type'] }}"}
    directory = changed(tiny, tmp_path / "old", preprocessor_config=pixels, chat_template=template)
    processor = checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
    assert processor.prompt("Why?") == "image"
    assert processor.image_size([(300, 300)]) == (36, 9)

  def test_another_image_processor(self, tiny, tmp_path):
    directory = changed(tiny, tmp_path / "bad", preprocessor_config={"patch_size": 8})
    with pytest.raises(UserError, match="makes patches of 8 px in squares of 2, but the model has 4 and 2"):
      checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()
    for number, fields in enumerate(({"do_resize": False}, {"size": {"shortest_edge": 256}})):
      directory = changed(tiny, tmp_path / str(number), preprocessor_config=fields)
      with pytest.raises(UserError, match="needs do_resize, and min_pixels and max_pixels"):
        checkpoint.open_checkpoint(str(directory), cache_dir=tmp_path).prompts()


@pytest.mark.parametrize(
  ("name", "part", "fields", "message"),
  [
    ("qwen2_vl", "vision", {"model_type": "clip_vision_model"}, "vision tower .clip_vision_model. is not supported"),
    ("qwen2_vl", "text", {"model_type": "llama"}, "language model 'llama' is not supported"),
    ("qwen2_vl", "text", {"rope_parameters": {"mrope_section": [2, 3, 4]}}, "three sections must share the 8 freq"),
    ("qwen2_vl", "text", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn' is not supp"),
    ("qwen2_vl", "vision", {"num_heads": 16}, "a tower of width 32 has no 16 heads"),
    ("qwen2_5_vl", "vision", {"out_hidden_size": 48}, "output has width 48, but the decoder has 64"),
    ("qwen2_5_vl", "vision", {"window_size": 7}, "window_size is 7, less than a square of patches, 8"),
    (
      "qwen2_5_vl",
      "vision",
      {"fullatt_block_indexes": [1, 55]},
      r"fullatt_block_indexes \[1, 55\] are not layers of 4",
    ),
    ("qwen2_5_vl", "vision", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
    ("qwen3_vl", "vision", {"num_position_embeddings": 35}, "is 35, not a square number"),
    ("qwen3_vl", "vision", {"deepstack_visual_indexes": [1, 4]}, r"\[1, 4\] are not ascending layers of 4"),
  ],
)
def test_bad_settings(name, part, fields, message):
  _, vision, text, more = tiny_qwen2_vl.SPECS[name]
  parts = {"vision_config": dict(vision), "text_config": dict(text)}
  own = parts[f"{part}_config"]
  for field, value in fields.items():
    own[field] = own[field] | value if isinstance(value, dict) else value
  with pytest.raises(UserError, match=message) as error:
    from_hf({"model_type": name, **parts, **more})
  assert "\n" not in str(error.value)


class TestBadPrompts:
  def test_a_strip(self, loaded):
    strip = Image.new("RGB", (10_000, 1))
    for use in (lambda: loaded.prompts().prepare([strip], "Why?"), lambda: loaded.prompts().image_size([strip.size])):
      with pytest.raises(UserError, match="has 10000 x 1 pixels; one side may be at most 200 times the other"):
        use()

  def test_a_placeholder_of_one_s_own(self, loaded, images):
    with pytest.raises(UserError, match=r"may not hold <\|image_pad\|>; <image> stands for the picture"):
      loaded.prompts().prepare(images[:1], "What is <|image_pad|>?")

  def test_more_pictures_than_the_context_holds(self, loaded, images):
    with pytest.raises(UserError, match="context of 512 tokens does not hold 720 image tokens and 4 new ones"):
      generate(loaded, [images[2:3] * 30], ["Which?"], generation=GENERATION, inputs=INPUTS)

  def test_class_attention(self, loaded):
    with pytest.raises(UserError, match="fastervlm.*himap"):
      loaded.schedule("fastervlm")


def test_windows_are_those_of_transformers():
  """At true size, for grids with whole and with partial windows."""
  for rows, columns in ((8, 8), (2, 26), (18, 10), (34, 46)):
    index, ends = get_vision_window_index(torch.tensor([[1, rows, columns]]), 2, 112, 14)
    window = np.zeros(len(index), int)
    for number, (start, end) in enumerate(zip(ends[:-1] // 4, ends[1:] // 4, strict=True)):
      window[index[start:end]] = number
    window = window.repeat(4)
    coordinates = np.pad(grid_coordinates(rows, columns, 2), ((0, 0), (1, 0)))  # of the first picture
    actual = np.asarray(window_of(jnp.asarray(coordinates)[None], 8)[0])
    np.testing.assert_array_equal(actual[:, None] == actual[None], window[:, None] == window[None])


@pytest.mark.parametrize("name", ["qwen2_vl_2b", "qwen2_5_vl_3b", "qwen3_vl_2b"])
def test_parameters_at_true_size(name):
  """Those of transformers, but for the second frame of a patch."""
  config, fields = geometries.model_of(name), geometries.GEOMETRIES[name]
  ours = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(config, jnp.bfloat16)))
  kind = tiny_qwen2_vl.SPECS[fields["model_type"]][0]
  with torch.device("meta"):
    own = getattr(transformers, f"{kind}Config")(**{key: fields[key] for key in fields if key != "model_type"})
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(own)
  model.tie_weights()
  theirs = sum(parameter.numel() for parameter in model.parameters())
  assert theirs - ours == 3 * config.vision.patch_size**2 * config.vision.hidden_size
