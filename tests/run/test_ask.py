"""A question in the terminal: the library's answer, as it is generated, and the kept patches; and what cannot be asked."""

import dataclasses
import re

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import himap_jax
from himap_jax import ask as command
from himap_jax.generation import InputConfig
from himap_jax.run.asking import Asker
from himap_jax.run.config import AnswerConfig

SETTING = ("himap", (2, 4), (8, 3))
QUESTION = "what is it?"


@pytest.fixture(scope="module")
def config(checkpoints):
  return AnswerConfig(
    checkpoint=str(checkpoints("clip_mha").directory),
    pruning=himap_jax.PruningConfig(*SETTING),
    generation=himap_jax.GenerationConfig(11, ignore_eos=True),
    inputs=InputConfig(prompt_template="<image>{question}", prompt_buckets=(32,), batch_size=1),
    dtype="float32",
  )


@pytest.fixture
def picture(tmp_path, images):
  images[1].save(tmp_path / "picture.png")
  return str(tmp_path / "picture.png")


def test_the_answer_is_the_library_s(config, picture, images, loaded, tmp_path, capsys):
  command.ask(config, [picture], QUESTION, tmp_path / "kept.png")
  out, err = capsys.readouterr()
  model = loaded("clip_mha")
  (answer,) = himap_jax.generate(
    model,
    images[1:2],
    [QUESTION],
    schedule=model.schedule(*SETTING),
    generation=config.generation,
    inputs=config.inputs,
  )
  assert out == f"{answer.text}\n" and len(answer.token_ids) == 11
  assert re.fullmatch(
    r"himap: 16 image tokens, 8 from layer 2 on, 3 from layer 4 on; prefill \S+ s, 11 tokens \S+ s",
    err.splitlines()[-1],
  )
  with Image.open(tmp_path / "kept.png") as sheet:
    assert sheet.width > 3 * 28  # the picture and two stages


def test_logits_that_are_not_finite(config, images):
  asker = Asker.open(config)
  asked = asker.prepare(images[1:2], QUESTION, config.pruning)
  pictures = asked.example.images
  nan = dataclasses.replace(asked.example, images=pictures.replace(pixels=np.full_like(pictures.pixels, np.nan)))
  with pytest.raises(himap_jax.UserError, match="logits are not finite"):
    asker.answer(asked._replace(example=nan))
  assert len(asker.answer(asked).answered.tokens) == 11


def test_no_picture(config, capsys):
  command.ask(config, [], QUESTION)
  assert capsys.readouterr().err.splitlines()[-1].startswith("himap: 0 image tokens, 0 from layer 2 on")


def test_text_appears_as_it_is_generated(capsys):
  """A character of several tokens appears when it is complete."""
  texts = {1: "a", 2: "a\ufffd", 3: "aé", 4: "aé b"}
  show, seen = command._printing(lambda tokens: texts[len(tokens)]), []
  for count in texts:
    assert show([0] * count) is False
    seen.append(capsys.readouterr().out)
  assert seen == ["a", "", "é", " b"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), 'a question is needed, as the last argument, in quotes: python -m himap_jax.ask picture.jpg "What is it?"'),
    ((__file__,), "a question is needed"),
    ((__file__, "  "), "a question is needed"),
    (("why?", __file__), "a question is needed, as the last argument"),
    (("what", "is", "it?"), "; the question is the last argument, in quotes: python -m himap_jax.ask picture.jpg"),
    ((__file__, "why?"), "test_ask.py: not an image of a supported format"),
    (("why?", "--show=kept.png"), "--show needs a picture"),
    ((__file__, "why?", "--show=/nowhere/kept.png"), "there is no directory /nowhere; make it first"),
    ((__file__, "why?", "--show=kept.jpg"), "--show=kept.jpg: a PNG is written; name a file that ends in .png"),
    ((__file__, "why?", "--show=/"), "--show=/ is a directory; name a file in it"),
    (("missing.png", "why?"), "missing.png"),
    (("caf\udce9?",), "the question has an unpaired surrogate, which is not text"),
    (("why?", "--max_new_tokens=0"), "--max_new_tokens must be at least 1"),
    (("why? " * 60, "--max_new_tokens=0"), "--max_new_tokens must be at least 1"),  # longer than a file's name can be
  ],
)
def test_what_cannot_be_asked(arguments, message, capsys):
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
    command.main(flags.FLAGS(["ask", *arguments]))
  assert caught.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("himap_jax.ask: ") and message in line


@pytest.mark.parametrize("name", ["picture.png", "./picture.png", "link.png"])
def test_show_over_a_picture(name, picture, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "link.png").symlink_to(picture)
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
    command.main(flags.FLAGS(["ask", "/nowhere.png", picture, "why?", f"--show={name}", "--checkpoint=/nowhere"]))
  assert caught.value.code == 2
  assert "is a picture of the question, which it would overwrite" in capsys.readouterr().err
