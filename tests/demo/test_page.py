"""The page in a real browser: a picture goes in, a slider moves, the answer and the overlay change."""

import json

import numpy as np
import pytest
from browser import Browser
from served import SETTING

QUESTION = "where is the cat?"
PATIENCE = 60  # seconds for two answers, which may have to be compiled
WHITE = 0.85


@pytest.fixture(scope="module")
def opened(page, tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp("profile"), 1280, 1300)
  yield browser
  browser.close()


@pytest.fixture
def tab(opened, page):
  """The freshly opened page; at the end nothing may have gone wrong in it or have been asked of others."""
  opened.errors.clear()
  opened.requests.clear()
  opened.open(page.url)
  opened.wait(
    "document.querySelector('#examples [aria-pressed=true]') && document.querySelector('#preview').naturalWidth"
  )
  yield opened
  assert not opened.errors
  assert all(url.startswith((page.url, f"blob:{page.url}", "data:")) for url in opened.requests)


def value(tab, selector, name="innerText"):
  return tab.evaluate(f"document.querySelector({json.dumps(selector)}).{name}")


def ask(tab):
  tab.evaluate("shown = null")
  tab.click("#ask")
  tab.wait("!document.querySelector('#ask').disabled", PATIENCE)


def give(tab, picture):
  before = value(tab, "#preview", "src")
  tab.choose_file("#file", picture)
  tab.wait(f"document.querySelector('#preview').src !== {json.dumps(before)}")


def patches(tab, side=4):
  """The middle of every patch of the large picture on the screen, as `[16, 3]`."""
  left, top, width, height = tab.box("#views .view")
  screen, places = tab.screenshot().astype(float), (np.arange(side) + 0.5) / side
  rows, columns = (top + places * height).astype(int), (left + places * width).astype(int)
  return screen[rows][:, columns].reshape(-1, 3)


def test_a_slider_changes_the_answer_and_the_overlay(tab, files, images, answers):
  give(tab, files[1])
  tab.write("#question", QUESTION)
  assert value(tab, "#settings", "value") == "--method=himap --prune_layers=2,4 --keep=8,3"
  ask(tab)
  first = answers(images[1], QUESTION, *SETTING)
  assert value(tab, "#plain .answer") == answers(images[1], QUESTION, "none").text
  assert value(tab, "#pruned .answer") == first.text
  legend = "dropped before layer 2: 8\ndropped before layer 4: 5\nkept to the end: 3"
  assert value(tab, "#legend") == legend
  overlay = value(tab, "#views img:last-child", "src")

  tab.evaluate("document.querySelector('#keep-0').focus()")
  for _ in range(4):
    tab.key("ArrowLeft", 37)
  assert value(tab, "#settings", "value") == "--method=himap --prune_layers=2,4 --keep=4,3"
  assert value(tab, "#results", "className") == "stale"
  ask(tab)
  second = answers(images[1], QUESTION, "himap", (2, 4), (4, 3))
  assert value(tab, "#pruned .answer") == second.text != first.text
  assert value(tab, "#legend") != legend and value(tab, "#views img:last-child", "src") != overlay
  assert value(tab, "#results", "className") == ""

  colours = patches(tab)
  tab.evaluate("document.querySelector('#layer').focus()")
  for _ in range(5):
    tab.key("ArrowRight", 39)
  assert value(tab, "#now") == "layers 4–5: 3 of 16 image tokens"
  late = patches(tab)
  kept = np.isin(np.arange(16), second.kept[-1])
  np.testing.assert_allclose(late[kept], colours[kept], atol=1)
  assert (late[~kept] >= 255 * WHITE - 1).all() and (colours < 255 * WHITE - 1).any(axis=1).all()


def test_errors_are_one_line(tab, files, tmp_path):
  tab.write("#question", "")
  ask(tab)
  assert value(tab, "#error") == "the question is empty"
  (tmp_path / "broken.png").write_bytes(files[1].read_bytes()[:60])
  give(tab, tmp_path / "broken.png")
  tab.write("#question", QUESTION)
  ask(tab)
  assert "damaged image" in value(tab, "#error") and "\n" not in value(tab, "#error")
  (tmp_path / "large.png").write_bytes(bytes(100_001))
  tab.choose_file("#file", tmp_path / "large.png")
  tab.wait("document.querySelector('#error').innerText === 'the picture has 100,001 bytes; at most 100,000 are taken'")


def test_settings_can_be_pasted(tab):
  tab.write("#settings", "--method=divprune+fastv --prune_layers=0,3 --keep=75%,4")
  tab.key("Enter", 13)
  tab.evaluate("document.activeElement.blur()")
  assert [value(tab, f"#{name}", "value") for name in ("method", "second", "keep-0", "layer-1", "keep-1")] == [
    "divprune", "fastv", "12", "3", "4",
  ]  # fmt: skip
  assert value(tab, "#settings", "value") == "--method=divprune+fastv --prune_layers=0,3 --keep=12,4"


def test_stages_are_added_and_removed(tab):
  tab.evaluate("document.querySelector('#method').value = 'fastv'")
  tab.evaluate("document.querySelector('#method').dispatchEvent(new Event('change'))")
  assert value(tab, "#settings", "value") == "--method=fastv --prune_layers=2 --keep=8"
  tab.click("#more")
  assert value(tab, "#settings", "value") == "--method=fastv --prune_layers=2,5 --keep=8,4"
  tab.click("#fewer")
  tab.click("#fewer")
  assert value(tab, "#settings", "value") == "--method=fastv --prune_layers=2 --keep=8"


def test_an_example_is_a_picture_and_its_questions(tab):
  assert value(tab, "#question", "value") == "what is it?"
  tab.click("#suggestions button:nth-child(2)")
  assert value(tab, "#question", "value") == "why?"
  ask(tab)
  assert value(tab, "#error", "hidden") and value(tab, "#pruned .answer")
