"""The page's server, of the standard library: its files, and answers as lines of JSON. It keeps nothing.

Answers are made one after another. `POST /answer` takes `{"picture": base64, "question": text, "settings": flags}` and
gives a line for every event: how many wait before this one, texts as they grow, and `result` or `error` at the end.
"""

import base64
import binascii
import contextlib
import http.server
import importlib.resources
import json
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from PIL import Image

from himap_jax.demo.choices import choices
from himap_jax.demo.comparing import compare, described
from himap_jax.errors import UserError
from himap_jax.run import pruning_flags
from himap_jax.run.asking import Asker
from himap_jax.run.pictures import PictureFiles

FILES = {
  "/": ("page.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
  "Cache-Control": "no-store",
  "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'self'",
  "Referrer-Policy": "no-referrer",
  "X-Accel-Buffering": "no",  # so that a proxy passes each line on at once
  "X-Content-Type-Options": "nosniff",
}
OTHERS = 65_536  # bytes of a request besides its picture
TIMEOUT = 60  # seconds for which a visitor may neither send nor read


class Limits(NamedTuple):
  """What visitors may ask for.

  Attributes:
    picture_bytes: of a picture's file.
    picture_pixels: of a picture.
    waiting: visitors that wait for an answer.
  """

  picture_bytes: int = 16 << 20
  picture_pixels: int = 32_000_000
  waiting: int = 8


class ExamplePicture(NamedTuple):
  """A picture to start from: its file's content and media type, and questions about it."""

  content: bytes
  kind: str
  questions: tuple[str, ...]


class Queue:
  """Lets one visitor after another in, in the order in which they come."""

  def __init__(self, most_waiting: int):
    self._most, self._visitors, self._changed = most_waiting, [], threading.Condition()

  @contextlib.contextmanager
  def turn(self, wait: Callable[[int], None]) -> Iterator[None]:
    """Waits for the visitor's turn; `wait` is told every second how many are before it, and may raise.

    Raises:
      UserError: too many wait.
    """
    visitor = object()
    with self._changed:
      if len(self._visitors) > self._most:
        raise UserError("too many visitors are waiting; ask again in a minute")
      self._visitors.append(visitor)
    try:
      while before := self._before(visitor):
        wait(before)
      yield
    finally:
      with self._changed:
        self._visitors.remove(visitor)
        self._changed.notify_all()

  def _before(self, visitor: object) -> int:
    """How many are before a visitor; waits at most a second for there to be none."""
    with self._changed:
      self._changed.wait_for(lambda: self._visitors[0] is visitor, timeout=1)
      return self._visitors.index(visitor)


class Page(http.server.ThreadingHTTPServer):
  """Serves one model at an address."""

  daemon_threads = True

  def __init__(
    self, address: tuple[str, int], asker: Asker, examples: Sequence[ExamplePicture] = (), limits: Limits = Limits()
  ):
    super().__init__(address, _Visit)
    self.asker, self.limits, self.queue = asker, limits, Queue(limits.waiting)
    folder = importlib.resources.files("himap_jax.demo")
    self.files = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
    for number, example in enumerate(examples):
      self.files[f"/examples/{number}"] = example.content, example.kind
    about = {
      "checkpoint": asker.config.checkpoint,
      "settings": pruning_flags.text(asker.config.pruning),
      "examples": [{"path": f"examples/{number}", "questions": own.questions} for number, own in enumerate(examples)],
      "most_bytes": limits.picture_bytes,
      **choices(asker),
    }
    self.files["/about"] = json.dumps(about).encode(), "application/json"

  @property
  def url(self) -> str:
    host, port = self.server_address
    return f"http://{host}:{port}/"

  def answer(self, body: bytes, tell: Callable[..., None]) -> dict[str, Any]:
    """The result for a request, as JSON; `tell` takes what happens meanwhile. Raises `UserError`."""
    try:
      request = json.loads(body)
      content, question, settings = (str(request[name]) for name in ("picture", "question", "settings"))
    except (ValueError, KeyError, TypeError) as error:
      raise UserError("a request is an object with picture, question and settings") from error
    picture = self._picture(content)
    pruning = pruning_flags.parse(settings)
    with self.queue.turn(lambda count: tell(waiting=count)):
      tell(waiting=0)
      shown = compare(
        self.asker, picture, question, pruning, lambda side, name, value: tell(side=side, **{name: value})
      )
    return described(shown)

  def _picture(self, content: str) -> Image.Image:
    if not content:
      raise UserError("there is no picture yet")
    try:
      data = base64.b64decode(content, validate=True)
    except binascii.Error as error:
      raise UserError("the picture is not base64") from error
    if len(data) > self.limits.picture_bytes:
      raise UserError(f"the picture has {len(data):,} bytes; at most {self.limits.picture_bytes:,} are taken")
    return PictureFiles().load(data, max_pixels=self.limits.picture_pixels)[0]


class _Visit(http.server.BaseHTTPRequestHandler):
  """One request."""

  server: Page
  timeout = TIMEOUT
  server_version, sys_version = "himap_jax", ""

  def do_GET(self) -> None:
    content, kind = self.server.files.get(self.path.partition("?")[0], (None, ""))
    if content is None:
      self.send_error(HTTPStatus.NOT_FOUND)
      return
    self._start(f"{kind}; charset=utf-8" if kind.startswith("text/") else kind, len(content))
    self.wfile.write(content)

  def do_POST(self) -> None:
    length, kind = self.headers.get("Content-Length", ""), self.headers.get_content_type()
    most = self.server.limits.picture_bytes * 4 // 3 + OTHERS
    if self.path != "/answer":
      self.send_error(HTTPStatus.NOT_FOUND)
    elif kind != "application/json":  # other pages in the visitor's browser cannot send it
      self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    elif not length.isdecimal() or int(length) > most:
      self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    else:
      with contextlib.suppress(ConnectionError, TimeoutError):  # the visitor has left
        self._answer(self.rfile.read(int(length)))

  def _answer(self, body: bytes) -> None:
    self._start("application/x-ndjson")
    try:
      self._tell(result=self.server.answer(body, self._tell))
    except UserError as error:
      self._tell(error=" ".join(str(error).split()))
    except (ConnectionError, TimeoutError):
      raise
    except Exception:
      traceback.print_exc()
      self._tell(error="this is a bug; the terminal in which the page was started says more")

  def _start(self, kind: str, length: int | None = None) -> None:
    self.send_response(HTTPStatus.OK)
    own = {"Content-Type": kind} | ({} if length is None else {"Content-Length": str(length)})
    for name, value in (HEADERS | own).items():
      self.send_header(name, value)
    self.end_headers()

  def _tell(self, **event: Any) -> None:
    self.wfile.write(json.dumps(event).encode() + b"\n")
    self.wfile.flush()

  def log_message(self, format: str, *args: Any) -> None:
    """Requests are not logged."""
