"""The page's server without a browser: what it serves, what it refuses, who waits, and that it keeps nothing."""

import base64
import http.client
import json
import os
import threading

import commands
import numpy as np
import pytest
from PIL import Image
from served import NAME, SETTING

from himap_jax.demo.server import Queue
from himap_jax.errors import UserError

FLAGS = "--method=himap --prune_layers=2,4 --keep=8,3"
JSON = {"Content-Type": "application/json"}


def ask(page, body, path="/answer", headers=JSON):
  """The status, and the events of the answer if there is one."""
  connection = http.client.HTTPConnection(*page.server_address, timeout=60)
  connection.request("POST" if body else "GET", path, body, headers)
  response = connection.getresponse()
  content = response.read()
  connection.close()
  is_answer = response.getheader("Content-Type") == "application/x-ndjson"
  return response, [json.loads(line) for line in content.splitlines()] if is_answer else content


def request(content, question="what is it?", settings=FLAGS):
  return json.dumps({"picture": base64.b64encode(content).decode(), "question": question, "settings": settings})


def test_events_and_result(page, files, answers, images, tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  before = set(os.listdir())
  _, events = ask(page, request(files[1].read_bytes()))
  assert events[0] == {"waiting": 0}
  result = events[-1]["result"]
  assert result["pruned"]["text"] == answers(images[1], "what is it?", *SETTING).text
  assert [event["text"] for event in events if event.get("side") == "plain" and "text" in event][-1] == result["plain"][
    "text"
  ]
  assert not list(tmp_path.iterdir()) and set(os.listdir()) == before


def large_picture(tmp_path):
  Image.fromarray(np.zeros((101, 100, 3), np.uint8)).save(tmp_path / "large.png")
  return (tmp_path / "large.png").read_bytes()


@pytest.mark.parametrize(
  ("content", "question", "settings", "message"),
  [
    (b"", "why?", FLAGS, "there is no picture yet"),
    (b"GIF89a??", "why?", FLAGS, "damaged image"),
    (b"no picture", "why?", FLAGS, "not an image of a supported format"),
    (b"x" * 100_001, "why?", FLAGS, "the picture has 100,001 bytes; at most 100,000 are taken"),
    (large_picture, "why?", FLAGS, "10,100 pixels is above the limit of 10,000"),
    (None, "  ", FLAGS, "the question is empty"),
    (None, "why?", "--method=himap --prune_layers=2,4 --keep=3,8", "cannot keep 8 image tokens before layer 4"),
    (None, "why?", "--flagfile=/etc/passwd", "is none of --method="),
  ],
)
def test_errors_are_one_line(page, files, tmp_path, content, question, settings, message):
  content = files[1].read_bytes() if content is None else content(tmp_path) if callable(content) else content
  response, events = ask(page, request(content, question, settings))
  assert response.status == 200
  assert message in events[-1]["error"] and "\n" not in events[-1]["error"]


def test_requests_of_others_are_refused(page):
  assert ask(page, request(b""), headers={"Content-Type": "text/plain"})[0].status == 415  # any page can send that
  assert ask(page, request(b""), headers=JSON | {"Content-Length": "300000"})[0].status == 413
  assert ask(page, request(b""), path="/else")[0].status == 404
  assert ask(page, None, path="/../pyproject.toml")[0].status == 404
  for body in ("[]", "{", '{"picture": ""}'):
    assert ask(page, body)[1] == [{"error": "a request is an object with picture, question and settings"}]


def test_the_page_allows_itself_alone(page):
  response, content = ask(page, None, path="/")
  assert "default-src 'self'" in response.getheader("Content-Security-Policy")
  assert b"http" not in content


def test_one_after_another():
  queue, order, waited = Queue(2), [], []
  is_waiting = {"first": threading.Event(), "second": threading.Event()}

  def visit(name):
    def wait(count):
      waited.append((name, count))
      is_waiting[name].set()

    with queue.turn(wait):
      order.append(name)

  others = {name: threading.Thread(target=visit, args=(name,)) for name in is_waiting}
  with queue.turn(pytest.fail):
    for name, other in others.items():
      other.start()
      assert is_waiting[name].wait(60)
    with pytest.raises(UserError, match="too many visitors are waiting"), queue.turn(pytest.fail):
      pass
    assert order == []
  for other in others.values():
    other.join()
  assert order == ["first", "second"] and waited[0] == ("first", 1) and ("second", 2) in waited


def test_a_visitor_who_leaves_makes_room():
  queue = Queue(1)

  def leave(count):
    raise ConnectionError

  with queue.turn(pytest.fail):
    for _ in range(2):
      with pytest.raises(ConnectionError), queue.turn(leave):
        pass


def test_the_command(checkpoints):
  command = commands.Command(
    "himap_jax.demo", f"--checkpoint={checkpoints(NAME).directory}", "--prompt_template=<image>{question}",
    "--method=fastv", "--port=0", "--compilation_cache_dir=",
  )  # fmt: skip
  command.wait_until(lambda: "Ctrl-C ends it" in command.text()[0])
  host, port = command.text()[0].split("/")[2].split(":")
  connection = http.client.HTTPConnection(host, int(port), timeout=60)
  connection.request("GET", "/about")
  about = json.loads(connection.getresponse().read())
  connection.close()
  assert about["settings"] == "--method=fastv" and len(about["examples"]) == 4
  command.interrupt()
  command.communicate()
  assert command.process.exitcode == 0 and "Traceback" not in command.text()[1]
