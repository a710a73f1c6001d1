"""Where a picture's bytes come from: the row itself, a file, a `data:` URL, base64, or an address on the web."""

import base64
import contextlib
import errno
import http.client
import io
import os
import pathlib
import re
import stat
import tempfile
import threading
import time
import urllib.request

from himap_jax.errors import UserError

URL_TIMEOUT = 30  # seconds without a byte
MAX_URL_SECONDS = 300
MAX_URL_BYTES = 1 << 28
MAX_KEPT_BYTES = 1 << 30  # of downloads, on disk

_DATA_URL = re.compile(r"data:[\w./+-]*(;[\w=.+-]+)*;base64,", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]{64,}={0,2}\s*", re.ASCII)
# How base64 of JPEG, PNG, GIF, WebP, BMP, TIFF, PPM and AVIF files begins.
_PICTURE = re.compile(r"/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3].{5}AAAA|SUk[qr]A|TU0AK|UD[EIMQUY][gJKN]|AAAA..Z0eXB")
_LONGEST_PATH = 1000  # longer ones are data, of which messages show the start
_SHOWN = 100
_SEGMENTS = 16  # of what is kept
_READ_BYTES = 1 << 20  # at a time


def is_url(image: str | bytes) -> bool:
  """Whether a picture's name is an address on the web."""
  return isinstance(image, str) and image.startswith(("http://", "https://"))


def is_name(image: str | bytes) -> bool:
  """Whether it names a picture and does not hold it."""
  return isinstance(image, str) and len(image) <= _LONGEST_PATH


def short_name(image: str | bytes) -> str:
  """A picture's name for messages."""
  if isinstance(image, bytes):
    return f"the picture of {len(image):,} bytes in the row"
  return image if len(image) <= _LONGEST_PATH else f"{image[:_SHOWN]}…"


def open_source(image: str | bytes, image_dir: pathlib.Path, *, allow_urls: bool = False) -> io.BufferedIOBase:
  """Opens a picture's bytes.

  Args:
    image: the bytes themselves; a path, relative to `image_dir`; a `data:` URL; base64 of a file, which is a path if it
      is short and does not begin as a picture; or with `allow_urls` an http or https URL, which is downloaded unless
      it is among those that were used last.

  Raises:
    UserError: it cannot be read.
  """
  if isinstance(image, bytes):
    return io.BytesIO(image)
  if image.startswith("data:"):
    match = _DATA_URL.match(image)
    if match is None:
      raise UserError(f"{short_name(image)}: only data: URLs in base64 are supported")
    return _decoded(image[match.end() :], image)
  if is_url(image):
    if not allow_urls:
      raise UserError(f"{short_name(image)}: pictures are read from the web with --allow_urls only")
    return io.BytesIO(_downloaded(image))
  try:
    path = image_dir / image
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")
  except OSError as error:
    if _BASE64.fullmatch(image) and (_PICTURE.match(image) or not is_name(image)):
      return _decoded(image, image)
    is_missing = isinstance(error, FileNotFoundError) and not os.path.isabs(image)
    where = f" in {image_dir.absolute()}" if is_missing else ""
    raise UserError(f"{short_name(image)}: {error.strerror}{where}") from error
  except ValueError as error:
    raise UserError(f"{short_name(image)!r}: {error}") from error


def _decoded(text: str, image: str) -> io.BufferedIOBase:
  try:
    return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
  except ValueError as error:
    raise UserError(f"{short_name(image)}: not base64: {error}") from error


class _Segment:
  """Downloaded bytes by their address, in a file without a name: whatever ends the process, nothing of it stays."""

  def __init__(self):
    self._file = tempfile.TemporaryFile(buffering=0)
    self._places: dict[str, tuple[int, int]] = {}
    self.num_bytes = 0

  def get(self, url: str) -> bytes | None:
    if url not in self._places:
      return None
    start, size = self._places[url]
    return os.pread(self._file.fileno(), size, start)

  def add(self, url: str, data: bytes) -> None:
    if os.pwrite(self._file.fileno(), data, self.num_bytes) == len(data):
      self._places[url] = self.num_bytes, len(data)
      self.num_bytes += len(data)

  def close(self) -> None:
    self._file.close()


class _Downloads:
  """The downloads that were used last, at most `MAX_KEPT_BYTES` on disk. Thread-safe.

  They are in a few files, so that many small ones need few descriptors. The oldest is dropped whole; what of it is used
  meanwhile goes to the end of the newest.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._segments: list[_Segment] = []  # the newest first

  def get(self, url: str) -> bytes | None:
    with self._lock:
      for number, segment in enumerate(self._segments):
        data = segment.get(url)
        if data is not None:
          if 0 < number == len(self._segments) - 1:
            self._add(url, data)
          return data
    return None

  def add(self, url: str, data: bytes) -> None:
    """Keeps a download, unless the disk is full."""
    with self._lock:
      self._add(url, data)

  def close(self) -> None:
    while self._segments:
      self._segments.pop().close()

  def _add(self, url: str, data: bytes) -> None:
    with contextlib.suppress(OSError):
      while self._segments and sum(own.num_bytes for own in self._segments) + len(data) > MAX_KEPT_BYTES:
        self._segments.pop().close()
      if not self._segments or self._segments[0].num_bytes >= MAX_KEPT_BYTES // _SEGMENTS:
        self._segments.insert(0, _Segment())
      self._segments[0].add(url, data)


_downloads = _Downloads()


def _downloaded(url: str) -> bytes:
  """A file on the web, which is downloaded if it is not kept; raises `UserError` if it cannot be downloaded."""
  request = urllib.request.Request(url, headers={"User-Agent": "himap_jax"})
  try:
    data = _downloads.get(url)
    if data is None:
      with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response:
        data = _read(response)
      _downloads.add(url, data)
    return data
  except (OSError, ValueError, http.client.HTTPException) as error:
    raise UserError(f"{short_name(url)}: cannot be downloaded ({str(error) or type(error).__name__})") from error


def _read(response: http.client.HTTPResponse) -> bytes:
  """Reads a download within its limits; raises `OSError` or `HTTPException`."""
  file, end = io.BytesIO(), time.monotonic() + MAX_URL_SECONDS
  while data := response.read1(_READ_BYTES):
    file.write(data)
    if file.tell() > MAX_URL_BYTES:
      raise OSError(f"larger than {MAX_URL_BYTES:,} bytes")
    if time.monotonic() > end:
      raise TimeoutError(f"it takes more than {MAX_URL_SECONDS} seconds")
  missing = getattr(response, "length", None)  # where the server has said how much it sends
  if missing:
    raise OSError(f"{missing:,} bytes are missing at its end")
  return file.getvalue()
