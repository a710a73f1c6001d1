"""A headless Chromium that clicks, drags, types and takes screenshots, driven by the DevTools protocol over a pipe."""

import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = "these tests need Chromium on the PATH: `apt-get install chromium`, or Google Chrome"
FLAGS = (
  "--headless --no-sandbox --remote-debugging-pipe --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
  "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
  "--force-color-profile=srgb"
)
TIMEOUT, PATIENCE = 60, 10  # seconds for one answer, and for a page to get somewhere


class Browser:
  """One tab. `errors` and `requests` hold what its console complained of and every address that it asked for."""

  def __init__(self, profile: Path, width: int, height: int):
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
      raise FileNotFoundError(MISSING)
    # Chromium reads commands from file descriptor 3 and answers on 4, each message ended by a zero byte.
    command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null', "sh", program, *FLAGS.split()]
    self._process = subprocess.Popen(
      [*command, f"--user-data-dir={profile}", "about:blank"],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
    )  # fmt: skip
    self._ids, self._session, self._received = itertools.count(1), {}, b""
    self.errors, self.requests = [], []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.call(f"{domain}.enable")
    self.resize(width, height)

  def close(self) -> None:
    self._process.terminate()
    self._process.wait(TIMEOUT)
    self._process.stdin.close()
    self._process.stdout.close()

  def call(self, method: str, **params):
    """Sends a DevTools command and returns its result; events that come meanwhile are noted."""
    number = next(self._ids)
    message = {"id": number, "method": method, "params": params, **self._session}
    self._process.stdin.write(json.dumps(message).encode() + b"\0")
    while (answer := self._receive()).get("id") != number:
      self._note(answer)
    if "error" in answer:
      raise RuntimeError(f"{method}: {answer['error']['message']}")
    return answer["result"]

  def open(self, page: Path | str) -> None:
    """Opens a file or an address, and waits until it is loaded."""
    url = page.as_uri() if isinstance(page, Path) else page
    self.call("Page.navigate", url=url)
    self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

  def evaluate(self, expression: str):
    """The value of a JavaScript expression."""
    result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
    if "exceptionDetails" in result:
      raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception']['description']}")
    return result["result"].get("value")

  def wait(self, condition: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not self.evaluate(condition):
      if time.monotonic() > deadline:
        raise TimeoutError(f"{condition}; errors in the page: {self.errors}")
      time.sleep(0.02)

  def box(self, selector: str) -> tuple[float, float, float, float]:
    """Scrolls the element into view; its left, top, width and height in the window."""
    return tuple(
      self.evaluate(f"""(() => {{
        const node = document.querySelector({json.dumps(selector)});
        node.scrollIntoView({{block: "center", behavior: "instant"}});
        const {{left, top, width, height}} = node.getBoundingClientRect();
        return [left, top, width, height];
      }})()""")
    )

  def click(self, selector: str) -> None:
    left, top, width, height = self.box(selector)
    self.drag((left + width / 2, top + height / 2))

  def drag(self, *points: tuple[float, float]) -> None:
    """Presses the mouse at the first point, moves through the others and lets go."""
    moves = [("mouseMoved", points[0]), ("mousePressed", points[0])]
    moves += [("mouseMoved", point) for point in points[1:]] + [("mouseReleased", points[-1])]
    for kind, (x, y) in moves:
      self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

  def write(self, selector: str, text: str) -> None:
    """Replaces what is in a text field by typing."""
    self.click(selector)
    self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
    self.call("Input.insertText", text=text) if text else self.key("Backspace", 8)

  def choose_file(self, selector: str, path: Path) -> None:
    """Puts a file into a file field."""
    field = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
    self.call("DOM.setFileInputFiles", objectId=field["objectId"], files=[str(path)])

  def key(self, name: str, code: int, text: str = "") -> None:
    for kind in ("keyDown", "keyUp"):
      typed = {"text": text} if text and kind == "keyDown" else {}
      self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **typed)

  def screenshot(self) -> np.ndarray:
    """What the window shows, as (height, width, 3) bytes."""
    content = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

  def resize(self, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    self.call("Emulation.setDeviceMetricsOverride", **size)

  def colour_scheme(self, name: str) -> None:
    self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

  def _receive(self):
    output = self._process.stdout.fileno()
    while b"\0" not in self._received:
      if not select.select([output], [], [], TIMEOUT)[0]:
        raise TimeoutError("Chromium does not answer")
      if not (part := os.read(output, 1 << 16)):
        raise RuntimeError("Chromium ended")
      self._received += part
    message, _, self._received = self._received.partition(b"\0")
    return json.loads(message)

  def _note(self, event) -> None:
    params = event.get("params", {})
    match event.get("method"):
      case "Runtime.exceptionThrown":
        self.errors.append(params["exceptionDetails"])
      case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
        self.errors.append(params["args"])
      case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
        self.errors.append(params["entry"])
      case "Network.requestWillBeSent":
        self.requests.append(params["request"]["url"])
