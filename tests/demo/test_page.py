"""The page in a real browser: a picture goes in, a slider moves, the answer and the overlay change."""

import io
import json
import os
import urllib.request
import uuid

import numpy as np
import pytest
from browser import Browser
from PIL import Image
from served import SETTING

pytestmark = [  # of Gradio's queue and event loops
  pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning"),
  pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
QUESTION = "where is the cat?"
PATIENCE = 60  # seconds for two answers, which may have to be compiled
SIDE = 4  # patches
OF_GRADIO = "Method not implemented."  # what it says whenever its queue has answered


@pytest.fixture(scope="module")
def opened(page, tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp("profile"), 1280, 1300)
  yield browser
  browser.close()


@pytest.fixture
def tab(opened, page):
  """The freshly opened page; at the end nothing may have gone wrong in it or have been asked of others."""
  opened.open("about:blank")  # ends what the page before still waits for, which is an error there
  opened.errors.clear()
  opened.requests.clear()
  opened.open(page)
  opened.wait("document.querySelector('#keep-1') !== null && document.querySelector('#picture img') !== null")
  yield opened
  assert not [error for error in opened.errors if OF_GRADIO not in str(error)]
  assert len(opened.requests) > 10
  assert all(url.startswith((page, f"blob:{page}", "data:")) for url in opened.requests)


def value(tab, selector, name="value"):
  return tab.evaluate(f"document.querySelector({json.dumps(selector)})?.{name}")


def wait_for(tab, selector, expected, name="value", patience=10):
  tab.wait(f"document.querySelector({json.dumps(selector)})?.{name} === {json.dumps(expected)}", patience)


def settings(tab, expected):
  wait_for(tab, "#settings textarea", expected)


def choose(tab, control, name):
  tab.click(f"#{control} input")
  tab.wait("document.querySelectorAll('[role=option]').length > 3")
  own = f"[...document.querySelectorAll('[role=option]')].find((x) => x.innerText.includes('{name}'))"
  tab.evaluate(f"{own}.id = 'chosen'")
  tab.click("#chosen")
  tab.wait("document.querySelector('[role=option]') === null")


def give(tab, picture):
  tab.click("#picture [aria-label='Remove Image']")
  tab.wait("document.querySelector('#picture input[type=file]') !== null")
  tab.choose_file("#picture input[type=file]", picture)
  tab.wait(f"document.querySelector('#picture img')?.src.endsWith({json.dumps(picture.name)})")


def ask(tab):
  """Asks, and waits for the pictures of its result: the one that is shown."""
  before = value(tab, "#gallery .preview img", "src")
  tab.click("#ask")
  tab.wait(
    f"![undefined, {json.dumps(before)}].includes(document.querySelector('#gallery .preview img')?.src)", PATIENCE
  )
  tab.wait("document.querySelector('#legend').innerText.includes('highest score')")
  with urllib.request.urlopen(value(tab, "#gallery .preview img", "src")) as file:
    return np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")).astype(float)


def answer_to(page, path):
  """What the page's interface for programs answers to a question about a file, which need not be an uploaded one."""
  with urllib.request.urlopen(f"{page}config") as response:
    config = json.load(response)
  buttons = [one["id"] for one in config["components"] if one["props"].get("elem_id") == "ask"]
  (handler,) = (one["id"] for one in config["dependencies"] if [buttons[0], "click"] in one["targets"])
  session = uuid.uuid4().hex
  body = {"data": [{"path": path}, QUESTION, "--method=none"], "fn_index": handler, "session_hash": session}
  headers = {"Content-Type": "application/json"}
  request = urllib.request.Request(f"{page}gradio_api/queue/join", json.dumps(body).encode(), headers)
  urllib.request.urlopen(request).close()
  with urllib.request.urlopen(f"{page}gradio_api/queue/data?session_hash={session}", timeout=PATIENCE) as lines:
    messages = (json.loads(line.removeprefix(b"data:")) for line in lines if line.startswith(b"data:"))
    return next(one["output"] for one in messages if one["msg"] == "process_completed")


def upload(page, path):
  """Sends a file to the page, and returns its path there."""
  content = b"--edge\r\nContent-Disposition: form-data; name=files; filename=it.png\r\n\r\n%b\r\n--edge--\r\n"
  headers = {"Content-Type": "multipart/form-data; boundary=edge"}
  request = urllib.request.Request(f"{page}gradio_api/upload", content % path.read_bytes(), headers)
  with urllib.request.urlopen(request) as response:
    return json.load(response)[0]


def is_kept(pixels):
  """Which patches of a picture are not white."""
  places = ((np.arange(SIDE) + 0.5) / SIDE * len(pixels)).astype(int)
  return (pixels[places][:, places].reshape(-1, 3) < 255 * 0.85 - 1).any(axis=1)


@pytest.mark.sampled(of="demos")
def test_a_slider_changes_the_answer_and_the_overlay(tab, files, images, answers):
  give(tab, files[1])
  tab.write("#question textarea", QUESTION)
  settings(tab, "--method=himap --prune_layers=2,4 --keep=8,3")
  pixels = ask(tab)
  first = answers(images[1], QUESTION, *SETTING)
  assert value(tab, "#plain textarea") == answers(images[1], QUESTION, "none").text
  assert value(tab, "#pruned textarea") == first.text
  assert np.flatnonzero(is_kept(pixels)).tolist() == first.kept[-1]
  assert "19%" in value(tab, "#table tbody tr:last-child", "innerText")
  assert "layers 4–5: 3 of 16 image tokens" in value(tab, "#gallery", "innerText")

  tab.evaluate("document.querySelector('#keep-0 input[type=range]').focus()")
  for _ in range(4):
    tab.key("ArrowLeft", 37)
  settings(tab, "--method=himap --prune_layers=2,4 --keep=4,3")
  pixels = ask(tab)
  second = answers(images[1], QUESTION, "himap", (2, 4), (4, 3))
  assert value(tab, "#pruned textarea") == second.text != first.text
  assert np.flatnonzero(is_kept(pixels)).tolist() == second.kept[-1] != first.kept[-1]
  shown = value(tab, "#gallery .preview img", "src")
  tab.click("#gallery .thumbnail-item:nth-child(2)")
  tab.wait(f"document.querySelector('#gallery .preview img').src !== {json.dumps(shown)}")
  assert "layers 2–3: 4 of 16 image tokens" in value(tab, "#gallery", "innerText")


def test_errors_are_one_line(tab, files, tmp_path):
  def error(count):
    tab.wait(f"document.querySelectorAll('.toast-message-text').length === {count}")
    return tab.evaluate("[...document.querySelectorAll('.toast-message-text')].at(-1).innerText")

  tab.write("#question textarea", "")
  tab.click("#ask")
  assert error(1) == "the question is empty"
  tab.write("#settings textarea", "--flagfile=/etc/passwd")
  tab.write("#question textarea", QUESTION)
  assert error(2).startswith("'--flagfile=/etc/passwd' is none of --method=")
  (tmp_path / "broken.png").write_bytes(files[1].read_bytes()[:60])
  give(tab, tmp_path / "broken.png")
  tab.click("#ask")
  message = error(3)
  assert "damaged image" in message and "\n" not in message and str(tmp_path) not in message


def test_only_uploaded_files_are_read(page, files):
  uploaded = upload(page, files[1])
  assert answer_to(page, uploaded)["data"][0]
  outside = (
    str(files[1]),
    f"{uploaded}/../../../../../../..{files[1]}",
    os.path.dirname(uploaded),
    "/dev/zero",
    "\0",
    None,
  )
  for path in outside:
    assert answer_to(page, path)["error"] == "the picture is gone or was never uploaded; choose it again", path


def test_large_files_and_pictures_are_refused(tab, tmp_path):
  Image.fromarray(np.zeros((101, 100, 3), np.uint8)).save(tmp_path / "large.png")
  give(tab, tmp_path / "large.png")
  tab.click("#ask")
  tab.wait(
    "document.querySelector('.toast-message-text')?.innerText.includes('10,100 pixels is above the limit of 10,000')"
  )
  (tmp_path / "heavy.png").write_bytes(bytes(100_001))
  tab.click("#picture [aria-label='Remove Image']")
  tab.wait("document.querySelector('#picture input[type=file]') !== null")
  tab.choose_file("#picture input[type=file]", tmp_path / "heavy.png")
  tab.wait(
    "[...document.querySelectorAll('.toast-message-text')].at(-1)?.innerText.includes('exceed the maximum allowed size')"
  )
  tab.errors.clear()  # the browser says of the refused upload that it failed


def test_settings_can_be_pasted(tab):
  """Controls follow them, and write them."""
  tab.write("#settings textarea", "--method=divprune+fastv --prune_layers=0,3 --keep=75%,4 --restore")
  tab.click("#question textarea")
  settings(tab, "--method=divprune+fastv --prune_layers=0,3 --keep=12,4 --restore")
  wait_for(tab, "#keep-0 input[type=number]", "12")
  assert [value(tab, f"#{name} input") for name in ("before", "inside", "layer-1", "keep-1")] == [
    "divprune", "fastv", "3", "4",
  ]  # fmt: skip
  assert value(tab, "#layer-0 input", "disabled") and not value(tab, "#layer-1 input", "disabled")
  assert value(tab, "#restored input", "checked")
  tab.click("#restored input")
  settings(tab, "--method=divprune+fastv --prune_layers=0,3 --keep=12,4")
  tab.click("#kept input")
  settings(tab, "--method=divprune+fastv --prune_layers=0,3 --keep=12,4 --keep_positions")
  tab.evaluate("document.querySelector('#layer-1 input[type=range]').focus()")
  tab.key("ArrowRight", 39)
  settings(tab, "--method=divprune+fastv --prune_layers=0,4 --keep=12,4 --keep_positions")
  choose(tab, "before", "none")
  settings(tab, "--method=fastv --prune_layers=2 --keep=8")
  tab.wait("document.querySelector('#kept input').disabled && !document.querySelector('#kept input').checked")
  tab.wait("document.querySelector('#keep-0') !== null && document.querySelector('#keep-1') === null")


def test_a_method_brings_its_sliders(tab):
  tab.write("#settings textarea", "--method=random --prune_layers=0 --keep=8 --keep_positions")
  tab.click("#question textarea")
  tab.wait("document.querySelector('#kept input').checked && document.querySelector('#keep-1') === null")
  wait_for(tab, "#layer-0 input[type=range]", "0")
  tab.evaluate("document.querySelector('#layer-0 input[type=range]').focus()")
  tab.key("ArrowRight", 39)
  settings(tab, "--method=random --prune_layers=1 --keep=8")
  tab.wait("document.querySelector('#kept input').disabled && !document.querySelector('#kept input').checked")
  choose(tab, "before", "none")
  settings(tab, "--method=none")
  choose(tab, "inside", "fastv")
  settings(tab, "--method=fastv --prune_layers=2 --keep=8")
  tab.wait("document.querySelector('#keep-0') !== null && document.querySelector('#keep-1') === null")


def test_an_empty_number_changes_nothing(tab):
  settings(tab, "--method=himap --prune_layers=2,4 --keep=8,3")
  number = "#keep-0 input[type=number]"
  tab.write(number, "")
  tab.evaluate("document.querySelector('#layer-1 input[type=range]').focus()")
  tab.key("ArrowRight", 39)
  tab.wait("document.querySelector('#layer-1 input[type=number]').value === '5'")
  tab.write(number, "5")
  settings(tab, "--method=himap --prune_layers=2,5 --keep=5,3")
  assert tab.evaluate("document.querySelector('.toast-message-text') === null")
