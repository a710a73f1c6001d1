"""The comparison behind the page: the library's answers, costs by their formula, and overlays pixel by pixel."""

import base64
import dataclasses
import io

import numpy as np
import pytest
import tiny_anyres
from PIL import Image
from served import SETTING

from himap_jax.demo.choices import choices
from himap_jax.demo.comparing import compare, described
from himap_jax.errors import UserError
from himap_jax.pruning.methods import PruningConfig
from himap_jax.run import pruning_flags
from himap_jax.run.asking import Asker
from himap_jax.run.model_flags import AnswerConfig

QUESTION = "what is it?"
GRID = 4  # patches along a side


@pytest.fixture(scope="module")
def events():
  return []


@pytest.fixture(scope="module")
def shown(asker, images, events):
  return compare(asker, images[1], QUESTION, PruningConfig(*SETTING), lambda *event: events.append(event))


def pixels(url):
  head, content = url.split(",")
  assert head == "data:image/png;base64"
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_answers_are_the_library_s(shown, answers, images, events):
  for side, setting in ((shown.plain, ("none",)), (shown.pruned, SETTING)):
    answer = answers(images[1], QUESTION, *setting)
    assert (side.text, side.num_new_tokens) == (answer.text, 11)
    assert side.image_tokens == (16, *map(len, answer.kept))
    assert side.prefill_seconds > 0 and side.decode_seconds > 0
  assert shown.kept == tuple(map(tuple, answer.kept))
  assert shown.spans == ((0, 2, 16), (2, 4, 8), (4, 6, 3))
  for name, side in (("plain", shown.plain), ("pruned", shown.pruned)):
    texts = [value for own, kind, value in events if (own, kind) == (name, "text")]
    assert len(texts) == 11 and texts[-1] == side.text.rstrip("\ufffd")


def test_only_what_is_new_is_compiled(shown, asker, images):
  first, second = (compare(asker, images[1], QUESTION, PruningConfig("himap", (2, 4), (7, 5))) for _ in range(2))
  assert first.pruned.compile_seconds > 0 == second.pruned.compile_seconds
  assert first.plain.compile_seconds == second.plain.compile_seconds == 0
  assert first.pruned.text == second.pruned.text


def test_costs(shown, asker, images):
  """FLOPs on image tokens are those of Eq. 10; the cache has a key and a value of 4 bytes a number for every token."""
  text = asker.opened.config.text
  num_text = asker.prepare([images[1]], QUESTION, PruningConfig("none")).example.num_text_tokens
  d, m = text.hidden_size, text.intermediate_size
  for side, counts in ((shown.plain, [16] * 6), (shown.pruned, [16, 16, 8, 8, 3, 3])):
    assert side.costs.image_tokens == sum(4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m for n in counts)
    width = text.num_key_value_heads * text.head_dim
    assert side.costs.cache_bytes == sum(2 * 4 * width * (n + num_text) for n in counts)


def test_overlays_colour_patches_by_the_stages_that_they_survive(shown):
  values = described(shown)
  (view,) = values["views"]
  colours = [tuple(bytes.fromhex(colour[1:])) for colour in values["colours"]]
  assert len(set(colours)) == 3
  survived = [sum(token in stage for stage in shown.kept) for token in range(GRID * GRID)]
  assert sorted(survived) == [0] * 8 + [1] * 5 + [2] * 3
  assert pixels(view["picture"]).shape == (28, 28, 3)
  for done in range(3):
    tint, veil = pixels(view["tints"][done]).reshape(-1, 4), pixels(view["veils"][done]).reshape(-1, 4)
    for token, stages in enumerate(survived):
      if stages < done:
        assert tuple(tint[token]) == tuple(veil[token]) == (255, 255, 255, 217)
      else:
        assert tuple(tint[token, :3]) == colours[stages] and 0 < tint[token, 3] < 128
        assert veil[token, 3] == 0


@pytest.mark.parametrize(
  ("question", "setting", "message"),
  [
    (" ", SETTING, "the question is empty"),
    ("why?", ("himap", (2, 4), (8, 9)), "cannot keep 9 image tokens before layer 4: there are 8"),
    ("why?", ("himap", (4, 2), (8, 3)), "pruning layers must ascend"),
    ("why?" * 1000, SETTING, "text tokens"),
  ],
)
def test_what_cannot_be_compared(asker, images, question, setting, message):
  with pytest.raises(UserError, match=message):
    compare(asker, images[1], question, PruningConfig(*setting), pytest.fail)


def test_percent_where_pictures_differ_in_image_tokens(tmp_path):
  tiny_anyres.make(tiny_anyres.NEXT, tmp_path)
  asker = Asker.open(AnswerConfig(checkpoint=str(tmp_path), pruning=PruningConfig("fastv", (2,), (0.125,))))
  about = choices(asker)
  assert about["num_image_tokens"] is None
  assert about["methods"]["fastv"]["keep"] == [12.5] and about["methods"]["random"]["keep"] == [25.0]
  counts = dataclasses.replace(asker.config, pruning=PruningConfig("fastv", (2,), (8,)))
  with pytest.raises(UserError, match="--keep=8: pictures of this model differ in image tokens"):
    choices(dataclasses.replace(asker, config=counts))


def test_every_choice_is_one_that_the_model_runs(asker):
  about = choices(asker)
  assert (about["num_layers"], about["num_image_tokens"]) == (6, 16)
  methods = about["methods"]
  assert (methods["himap"]["layers"], methods["himap"]["keep"]) == ([2, 4], [8, 3])
  assert {"none", "fastv", "divprune", "divprune+fastv"} < set(methods) and "fastv+divprune" not in methods
  assert [name for name, method in methods.items() if method["repeats"] and name in ("himap", "fastv")] == ["fastv"]
  for name, method in methods.items():
    setting = PruningConfig(name, tuple(method["layers"] + method["frozen"]), tuple(method["keep"]) or None)
    schedule = asker.schedule(pruning_flags.parse(pruning_flags.text(setting)))
    assert [stage.keep for stage in schedule.stages] == method["keep"]
