"""Pruning methods inside the model: what the tower tells them, positions, decoding, and rows that are their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
import torch

from himap_jax import GenerationConfig
from himap_jax.engine.engine import Batch, Engine
from himap_jax.engine.pool import Request
from himap_jax.engine.prefill import prefill
from himap_jax.engine.programs import method_parameters
from himap_jax.errors import UserError
from himap_jax.inputs import Images

NUM_SLOTS = 112
NUM_NEW = 6
NAME = "clip_mha"
WINDOW = "mistral"

# method -> layers and counts that six layers and 16 image tokens can have
SETTINGS = {"shortv": ((1, 3, 5), None), "himap_adaptive": ((2, 4), (12, 6)), "fastervlm": ((0,), (7,))}

encode = jax.jit(lambda model, images: model.bind().encode_images(images))


@pytest.fixture(scope="module")
def rows(checkpoints, images):
  return checkpoints(NAME).rows(images)


def generate(loaded, rows, method, name=NAME):
  own = loaded(name, batch_size=len(rows))
  engine = Engine(own.model, own.schedule(method, *SETTINGS[method]), GenerationConfig(NUM_NEW, ignore_eos=True))
  return engine(tiny_checkpoints.pad_batch(rows, NUM_SLOTS), range(len(rows)))


@pytest.mark.parametrize("name", ["clip_mha", "clip_gqa_tied", "dinov2"])
def test_class_attention_and_keys_are_those_of_transformers(name, checkpoints, loaded, images):
  tiny, model = checkpoints(name), loaded(name)
  pixels = torch.cat([tiny.encode(image, "<image>")[1] for image in images])
  tower = tiny.model.model.vision_tower
  keys = []
  hooks = [
    module.register_forward_hook(lambda module, arguments, output: keys.append(output))
    for path, module in tower.named_modules()
    if path.endswith(("k_proj", "attention.key"))
  ]
  with torch.no_grad():
    attentions = tower(pixels, output_attentions=True).attentions
  for hook in hooks:
    hook.remove()
  last = max(model.config.vision.feature_layers) - 1
  first = 0 if model.config.vision.select_strategy == "full" else 1
  actual = encode(model.model, Images(jnp.asarray(pixels.numpy())[:, None])).tower
  expected = attentions[last][:, :, 0].mean(1)[:, first:]
  np.testing.assert_allclose(actual.class_attention, expected, atol=1e-5, rtol=0)
  np.testing.assert_allclose(actual.keys.reshape(*actual.keys.shape[:2], -1), keys[last][:, first:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, has_grid", [("clip_mha", True), ("siglip", True), ("clip_gqa_tied", False)])
def test_the_grid_of_features(name, has_grid, loaded):
  """None where the class token is an image token."""
  model = loaded(name)
  side = model.config.vision.image_size
  tower = encode(model.model, Images(jnp.zeros((2, 3, 3, side, side)))).tower
  assert model.config.has_grid == has_grid == (tower.grid is not None)
  if has_grid:
    patches = side // model.config.vision.patch_size
    expected = np.stack(np.indices((3, patches, patches)), axis=-1).reshape(-1, 3)
    np.testing.assert_array_equal(tower.grid, [expected] * 2)


def test_a_tower_without_class_token_has_no_class_attention(loaded):
  model = loaded("siglip")
  side = model.config.vision.image_size
  tower = jax.eval_shape(encode, model.model, Images(jnp.zeros((1, 1, 3, side, side)))).tower
  assert tower.class_attention is None


def test_pruning_before_the_decoder_is_a_shorter_prompt(checkpoints, loaded, rows):
  """transformers' own generation from the embeddings of what FasterVLM keeps gives the same tokens."""
  name = WINDOW
  tiny = checkpoints(name)
  result = generate(loaded, rows, "fastervlm", name)
  for index, (input_ids, pixels) in enumerate(rows):
    with torch.no_grad():
      hidden, first, last = reference_himap.embed(tiny.model, input_ids, pixels)
      attention = tiny.model.model.vision_tower(pixels, output_attentions=True).attentions
      feature_layer = max(loaded(name).config.vision.feature_layers) - 1
      scores = attention[feature_layer][0, :, 0, 1:].mean(0)
      kept = scores.sort(descending=True, stable=True).indices[:7].sort().values
      assert result.kept[0][index] == kept.tolist()
      short = torch.cat([hidden[:first], hidden[first + kept], hidden[last + 1 :]])[None]
      expected = tiny.model.generate(
        inputs_embeds=short,
        attention_mask=torch.ones(short.shape[:2], dtype=torch.long),
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        do_sample=False,
        suppress_tokens=None,
        eos_token_id=None,
      )
    assert result.tokens[index] == expected[0].tolist()


def test_frozen_layers_update_text_only(checkpoints, loaded, rows):
  """ShortV against transformers' layers, whose output for image tokens is thrown away where they are frozen."""
  name = WINDOW
  tiny = checkpoints(name)
  decoder = tiny.model.model.language_model
  result = generate(loaded, rows, "shortv", name)
  assert result.kept == ()
  for index, (input_ids, pixels) in enumerate(rows):
    tokens = []
    for _ in range(NUM_NEW):
      with torch.no_grad():
        ids = torch.cat([input_ids, torch.tensor(tokens, dtype=torch.long)])
        hidden, first, last = reference_himap.embed(tiny.model, ids, pixels)
        for number, layer in enumerate(decoder.layers):
          updated, _ = reference_himap.run_layer(decoder, layer, hidden, torch.arange(len(ids)))
          if number in SETTINGS["shortv"][0]:
            updated[first : last + 1] = hidden[first : last + 1]
          hidden = updated
        logits = tiny.model.lm_head(decoder.norm(hidden[-1]))
      if not tokens:
        np.testing.assert_allclose(result.logits[index], logits, atol=1e-4, rtol=0)
      tokens.append(logits.argmax().item())
    assert result.tokens[index] == tokens


def test_attention_in_the_next_layer_is_within_its_window(checkpoints, loaded, rows):
  """PyramidDrop's first stage against transformers' attention of the next layer."""
  tiny = checkpoints(WINDOW)
  decoder = tiny.model.model.language_model
  schedule = loaded(WINDOW).schedule("pyramiddrop", (2, 3, 4), (8, 8, 8))
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, NUM_SLOTS))
  program = jax.jit(lambda model, *arguments: prefill(model.bind(), *arguments, schedule).kept[0])
  kept = program(loaded(WINDOW).model, batch, jax.random.split(jax.random.key(0), len(rows)))
  for index, (input_ids, pixels) in enumerate(rows):
    with torch.no_grad():
      hidden, first, last = reference_himap.embed(tiny.model, input_ids, pixels)
      for layer in decoder.layers[:3]:
        hidden, attention = reference_himap.run_layer(decoder, layer, hidden, torch.arange(len(input_ids)))
    scores = attention[-1, first : last + 1]
    assert kept[index].tolist() == scores.sort(descending=True, stable=True).indices[:8].sort().values.tolist()


def test_ranks_are_those_of_attention(checkpoints, loaded, rows):
  """FastV's ranking against transformers' attention of the last token."""
  tiny = checkpoints(NAME)
  decoder = tiny.model.model.language_model
  schedule = dataclasses.replace(loaded(NAME).schedule("fastv", (3,), (8,)), tells_ranks=True)
  batch = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, NUM_SLOTS))
  program = jax.jit(lambda model, *arguments: prefill(model.bind(), *arguments, schedule))
  state = program(loaded(NAME).model, batch, jax.random.split(jax.random.key(0), len(rows)))
  for index, (input_ids, pixels) in enumerate(rows):
    with torch.no_grad():
      hidden, first, last = reference_himap.embed(tiny.model, input_ids, pixels)
      for layer in decoder.layers[:3]:
        hidden, attention = reference_himap.run_layer(decoder, layer, hidden, torch.arange(len(input_ids)))
    best_first = attention[-1, first : last + 1].sort(descending=True, stable=True).indices[:8]
    assert [best_first[rank].item() for rank in state.ranks[0][index].tolist()] == state.kept[0][index].tolist()


def test_ranks_change_nothing_else(loaded, rows):
  """Also of rows that keep different counts."""
  model, batch = loaded(NAME, len(rows)), tiny_checkpoints.pad_batch(rows, NUM_SLOTS)
  schedule = model.schedule("himap_adaptive", *SETTINGS["himap_adaptive"])
  requests, answers = [Request(index, tag=index) for index in range(len(rows))], []
  for own in (schedule, dataclasses.replace(schedule, tells_ranks=True)):
    engine = Engine(model.model, own, GenerationConfig(NUM_NEW, ignore_eos=True))
    answered = (row for turn in engine.answer([Batch(batch, requests)]) for row in turn)
    answers.append(sorted(answered, key=lambda row: row.request.tag))
  for row, ranked in zip(*answers, strict=True):
    assert (row.kept, row.tokens) == (ranked.kept, ranked.tokens) and row.ranks == []
    np.testing.assert_array_equal(row.logits, ranked.logits)
    assert [sorted(stage) for stage in ranked.ranks] == [[*range(len(stage))] for stage in row.kept]
  assert len({len(row.kept[0]) for row in answers[0]}) > 1


def test_where_the_window_changes_the_next_layer_s_attention_is_refused(loaded, rows):
  model = loaded("qwen2")
  engine = Engine(model.model, model.schedule("pyramiddrop", (2, 3, 4), (8, 4, 2)), GenerationConfig(NUM_NEW))
  with pytest.raises(UserError, match="cannot prune before layer 3, where .* window changes from None to 10"):
    engine(tiny_checkpoints.pad_batch(rows, NUM_SLOTS), range(len(rows)))


def test_rows_that_keep_different_counts_are_their_own(checkpoints, loaded, rows):
  """The same program on the rows in another order and with other padding gives every row what it had."""
  model, keys = loaded(NAME).model, jax.random.split(jax.random.key(3), len(rows))
  schedule = loaded(NAME).schedule("himap_adaptive", *SETTINGS["himap_adaptive"])
  program = jax.jit(lambda model, *arguments: prefill(model.bind(), *arguments[:2], schedule, arguments[2]))

  def run(rows, keys, padding):
    batch = tiny_checkpoints.pad_batch(rows, NUM_SLOTS, padding)
    return program(model, jax.tree.map(jnp.asarray, batch), keys, method_parameters(schedule))

  expected, reverse = run(rows, keys, 0), run(rows[::-1], keys[::-1], 9)
  previous = [set(range(checkpoints(NAME).num_image_tokens))] * len(rows)
  for stage, kept in zip(schedule.stages, expected.kept, strict=True):
    assert kept.shape == (len(rows), stage.keep)
    own = [[index for index in row if index >= 0] for row in kept.tolist()]  # −1 where a row keeps fewer
    assert all(row == sorted(set(row)) and set(row) <= whole for row, whole in zip(own, previous, strict=True))
    previous = [set(row) for row in own]
  for forward, backward in zip(expected.kept, reverse.kept, strict=True):
    np.testing.assert_array_equal(forward, backward[::-1])
  np.testing.assert_allclose(expected.logits, reverse.logits[::-1], atol=1e-5, rtol=0)
  np.testing.assert_array_equal(expected.next_position, [len(input_ids) for input_ids, _ in rows])
