"""The comparison behind the page: the library's answers, costs by their formula, and what is shown of them."""

import concurrent.futures
import dataclasses
import functools
import os
import re
import threading
import time
import unittest.mock

import numpy as np
import pytest
import tiny_anyres
from served import SETTING

from himap_jax.demo import choices, results
from himap_jax.demo.comparing import compare
from himap_jax.errors import UserError
from himap_jax.pruning.config import PruningConfig
from himap_jax.pruning.methods import METHODS
from himap_jax.run import pruning_flags
from himap_jax.run.asking import Asker
from himap_jax.run.config import AnswerConfig
from himap_jax.run.pictures import PictureFiles

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # event loops of Gradio
QUESTION = "what is it?"
GRID = 4  # patches along a side


@pytest.fixture(scope="module")
def shown(asker, images):
  return compare(asker, images[1], QUESTION, PruningConfig(*SETTING))


@pytest.fixture
def make_handlers(limits, files, monkeypatch):
  """Returns `make(asker)`: the page's handlers, for which the pictures' files are uploaded."""
  from himap_jax.demo.page import Handlers

  monkeypatch.setenv("GRADIO_TEMP_DIR", str(files[0].parent))
  return lambda asker: Handlers(asker, limits)


def values_of(handlers, settings):
  """The values of the controls that the page has for settings."""
  import gradio

  with gradio.Blocks():
    return [control.value for control in handlers.controls(settings)]


def test_answers_are_the_library_s(shown, answers, images):
  for side, setting in ((shown.plain, ("none",)), (shown.pruned, SETTING)):
    answer = answers(images[1], QUESTION, *setting)
    assert (side.text, side.num_new_tokens) == (answer.text, 11)
    assert side.image_tokens == (16, *map(len, answer.kept))
    assert side.prefill_seconds > 0 and side.decode_seconds > 0
  assert shown.kept == tuple(map(tuple, answer.kept))
  assert [sorted(ranks) for ranks in shown.ranks] == [[*range(8)], [*range(3)]]
  assert shown.spans == ((0, 2, 16), (2, 4, 8), (4, 6, 3))


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


def test_table(shown):
  """Values are in the units that its rows name, and shares are of the answer without pruning."""
  lines = [line.strip("| ").split("|") for line in results.table(shown).splitlines() if line.startswith("|")]
  rows = {name.strip(): [value.strip() for value in values] for name, *values in lines}
  assert rows["image tokens left"] == ["16", "3", "**19%**"]
  for name, of, unit in (
    ("prefill, ms", lambda side: side.prefill_seconds, 1e3),
    ("decode, ms a token", lambda side: side.decode_seconds / 10, 1e3),
    ("FLOPs on image tokens, G", lambda side: side.costs.image_tokens, 1e-9),
    ("KV cache, MB", lambda side: side.costs.cache_bytes, 1e-6),
  ):
    plain, pruned, share = (float(re.sub(r"[*%,]", "", value)) for value in rows[name])
    np.testing.assert_allclose([plain, pruned], [unit * of(shown.plain), unit * of(shown.pruned)], rtol=1e-3)
    assert abs(share - 100 * of(shown.pruned) / of(shown.plain)) <= 0.5


def test_panels_colour_patches_by_rank(shown):
  """Of each patch that a stage keeps, by the rank of its score: the better, the darker; the others are white."""
  panels = results.panels(shown)
  assert [caption for _, caption in panels] == [
    "layers 0–1: 16 of 16 image tokens", "layers 2–3: 8 of 16 image tokens", "layers 4–5: 3 of 16 image tokens",
  ]  # fmt: skip
  (view,) = shown.views
  whole, *stages = (np.asarray(panel).astype(int) for panel, _ in panels)
  side = whole.shape[0] // GRID
  assert whole.shape == (side * GRID, side * GRID, 3) and side * GRID >= results.WIDTH
  large = view.picture.resize((side * GRID, side * GRID))
  np.testing.assert_array_equal(whole, np.asarray(large))
  for pixels, kept, ranks in zip(stages, shown.kept, shown.ranks, strict=True):
    added = {}
    for token in range(GRID * GRID):
      row, column = divmod(token, GRID)
      place = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
      if token in kept:
        added[ranks[kept.index(token)]] = ((pixels - 0.4 * whole)[place] / 0.6).mean(axis=(0, 1))
        assert (np.abs((pixels - 0.4 * whole)[place] / 0.6 - added[ranks[kept.index(token)]]) < 2).all()
      else:
        np.testing.assert_allclose(pixels[place], 0.15 * whole[place] + 0.85 * 255, atol=1.1)
    brightness = [added[rank].sum() for rank in range(len(kept))]
    assert brightness == sorted(brightness) and len(set(brightness)) == len(kept)
    np.testing.assert_allclose([added[0], added[len(kept) - 1]], [[59, 15, 112], [252, 253, 191]], atol=2)


def test_legend(shown):
  assert re.sub("<.*?>", "", results.legend(shown)) == "■ highest score ■ middle of the kept ■ lowest score kept"
  assert results.panels(dataclasses.replace(shown, views=())) == []
  assert "no patches" in results.legend(dataclasses.replace(shown, views=()))


@pytest.mark.parametrize(
  ("question", "setting", "message"),
  [
    (" ", SETTING, "the question is empty"),
    ("\ud800", SETTING, "the question has an unpaired surrogate"),
    ("why?", ("himap", (2, 4), (8, 9)), "cannot keep 9 image tokens before layer 4: there are 8"),
    ("why?", ("himap", (4, 2), (8, 3)), "pruning layers must ascend"),
    ("why?" * 600, SETTING, "text tokens"),
    ("why?" * 10000, SETTING, "the question has 40,000 characters, which no 512 tokens of context hold"),
  ],
)
def test_what_cannot_be_compared(asker, images, question, setting, message):
  with pytest.raises(UserError, match=message):
    compare(asker, images[1], question, PruningConfig(*setting))


def test_percent_where_pictures_differ_in_image_tokens(make_handlers, tmp_path):
  tiny_anyres.make(tiny_anyres.NEXT, tmp_path)
  asker = Asker.open(AnswerConfig(checkpoint=str(tmp_path)))
  assert asker.processor.num_image_tokens is None
  assert choices.spelled_out(asker, PruningConfig("fastv", (2,), (0.125,))).keep == (0.125,)
  assert choices.spelled_out(asker, PruningConfig("random")).keep == (0.25,)
  with pytest.raises(UserError, match="--keep=8: pictures of this model differ in image tokens"):
    choices.spelled_out(asker, PruningConfig("fastv", (2,), (8,)))
  handlers, settings = make_handlers(asker), "--method=fastv --prune_layers=2 --keep=12.5%"
  assert values_of(handlers, settings) == [2, 12.5]
  assert handlers.move(settings, 3, 30.5)[0] == "--method=fastv --prune_layers=3 --keep=30.5%"


def test_only_regular_files_up_to_the_limit_are_read(asker, make_handlers, limits, monkeypatch, tmp_path):
  import gradio

  monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
  handlers = make_handlers(asker)
  for name, count in (("small", limits.picture_bytes), ("large", limits.picture_bytes + 1)):
    (tmp_path / name).write_bytes(bytes(count))
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "link").symlink_to(__file__)
  for name, message in {
    "small": "not an image of a supported format",
    "large": "the picture's file is above the limit of 100,000 bytes",
    **dict.fromkeys(("pipe", "link", "missing", "a" * 300, "\ud800"), "the picture is gone or was never uploaded"),
  }.items():
    with pytest.raises(gradio.Error, match=message):
      handlers.answer({"path": str(tmp_path / name)}, QUESTION, "--method=none")


def test_only_some_questions_may_wait(asker, make_handlers, files, limits, monkeypatch):
  import gradio

  handlers, came, go_on = make_handlers(asker), threading.Semaphore(0), threading.Event()

  def refuse(*_):
    came.release()
    go_on.wait(60)
    raise UserError("enough")

  decode = unittest.mock.Mock(wraps=PictureFiles.load)
  monkeypatch.setattr(PictureFiles, "load", lambda *given, **options: decode(*given, **options))
  monkeypatch.setattr("himap_jax.demo.page.compare", refuse)
  ask = functools.partial(handlers.answer, {"path": files[0]}, QUESTION, "--method=none")
  with concurrent.futures.ThreadPoolExecutor(limits.waiting) as visitors:
    waiting = [visitors.submit(ask) for _ in range(limits.waiting)]
    came.acquire()
    while handlers._waiting._value:
      time.sleep(0.01)
    with pytest.raises(gradio.Error, match="4 questions wait for their answers already"):
      ask()
    decoded = decode.call_count
    assert handlers.paste("--method=none")[0] == "--method=none"
    go_on.set()
  assert decoded == 1  # of the question that is being answered
  assert {str(done.exception()) for done in waiting} == {"'enough'"}


def test_parameters_have_fields(asker, make_handlers):
  import gradio

  handlers = make_handlers(asker)
  settings = handlers.paste("--method=himap_adaptive --prune_layers=2,4 --keep=12,6")[0]
  assert settings == "--method=himap_adaptive --prune_layers=2,4 --keep=12,6 --method_parameters=threshold:0.8"
  assert values_of(handlers, settings) == [2, 4, 12, 6, 0.8]
  moved, _, kept = handlers.move(settings, 2, 5, 12, 6, 0.7)
  assert moved == "--method=himap_adaptive --prune_layers=2,5 --keep=12,6 --method_parameters=threshold:0.7"
  assert not kept.value and not kept.interactive
  with pytest.raises(gradio.Error, match="not those of the sliders"):
    handlers.move("--method=fastv --prune_layers=2 --keep=8", 2, 5, 12, 6, 0.7)


def test_an_empty_number_changes_nothing(asker, make_handlers):
  import gradio

  handlers, settings = make_handlers(asker), "--method=himap_adaptive --prune_layers=2,4 --keep=12,6"
  settings = handlers.paste(settings)[0]
  with gradio.Blocks():
    move = functools.partial(handlers.move_with, handlers.controls(settings), settings)
  for values in ((2, 4, None, 6, 0.8), (None, 4, 12, 6, 0.8), (2, 4, 12, 6, None)):
    assert move(*values) == gradio.skip()
  assert move(2, 4, 11, 6, 0.8)[0] == settings.replace("12", "11")
  with pytest.raises(gradio.Error, match="Value 17 is greater than maximum value 16"):
    move(2, 4, 17, 6, 0.8)


def test_switches_are_off_where_they_may_not_be_on_and_nowhere_else(asker, make_handlers):
  handlers = make_handlers(asker)
  whole = "--method=divprune+himap --prune_layers=0,2,4 --keep=12,8,3 --keep_positions"
  crossed, *_ = handlers.move(whole, 0, 5, 4, 12, 8, 3)  # layers that the next movement of a slider puts in order
  assert crossed == whole.replace("0,2,4", "0,5,4")
  assert handlers.move(crossed, 0, 2, 4, 12, 8, 3)[0] == whole
  settings, *_, restored, kept = handlers.choose("divprune", "none", True, False)
  assert "--restore" in settings and restored.value and restored.interactive and kept.interactive
  settings, *_, restored, kept = handlers.choose("none", "none", True, True)
  assert settings == "--method=none"
  assert not (restored.value or restored.interactive or kept.value or kept.interactive)


def test_every_choice_is_one_that_the_model_runs(asker, checkpoints):
  before, inside = choices.before(asker), choices.inside(asker)
  assert before[0] == inside[0] == "none" and {*before, *inside} == set(METHODS)
  assert set(before) & set(inside) == {"none", "random", "uniform"} and "divprune" in before and "fastv" in inside
  siglip = Asker.open(AnswerConfig(checkpoint=str(checkpoints("siglip").directory)))
  assert set(before) - set(choices.before(siglip)) >= {"fastervlm", "visionzip"}
  shallow = {
    "himap",
    "himap_adaptive",
    "himap_swapped",
    "image_attention",
    "pyramiddrop",
    "shortv",
    "sparsevlm",
    "visipruner",
  }
  for name in {*before, *inside, "divprune+fastv"} - shallow:  # of which six layers are too few for their defaults
    whole = choices.spelled_out(asker, PruningConfig(name, restore=name == "fastv"))
    assert asker.schedule(whole) == asker.schedule(PruningConfig(name, restore=whole.restore)).at(6, 16)
    assert pruning_flags.parse(pruning_flags.text(whole)) == whole
    assert choices.joined(*choices.split(name)) == name


@pytest.mark.parametrize(
  ("method", "expected"),
  [
    ("divprune", [None]), ("random", [0, 0]), ("fastv", [1, 1]), ("himap", [1, 1]),
    ("divprune+himap", [None, 1, 1]), ("random+random", [None, 1]),
  ],
)  # fmt: skip
def test_the_first_layer_of_a_stage(method, expected):
  assert [choices.first_layer(method, stage) for stage in range(len(expected))] == expected
