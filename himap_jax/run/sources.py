"""Where a picture's bytes come from: the row itself, a file, a `data:` URL, base64, or an address on the web."""

import base64
import errno
import functools
import http.client
import io
import os
import pathlib
import re
import stat
import tempfile
import time
import urllib.request
from typing import IO

from himap_jax.errors import UserError

URL_TIMEOUT = 30  # seconds without a byte
MAX_URL_SECONDS = 300
MAX_URL_BYTES = 1 << 28

_DATA_URL = re.compile(r"data:[\w./+-]*(;[\w=.+-]+)*;base64,", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/\r\n]{64,}={0,2}\s*", re.ASCII)
# How base64 of JPEG, PNG, GIF, WebP, BMP, TIFF, PPM and AVIF files begins.
_PICTURE = re.compile(r"/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3].{5}AAAA|SUk[qr]A|TU0AK|UD[EIMQUY][gJKN]|AAAA..Z0eXB")
_LONGEST_PATH = 1000  # longer ones are data, of which messages show the start
_SHOWN = 100
_COPIED_BYTES = 1 << 20  # at a time


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
      is short and does not begin as a picture; or with `allow_urls` an http or https URL, which is downloaded once.

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
    return open(_downloaded(image), "rb")
  try:
    path = image_dir / image
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")
  except OSError as error:
    if _BASE64.fullmatch(image) and (_PICTURE.match(image) or not is_name(image)):
      return _decoded(image, image)
    raise UserError(f"{short_name(image)}: {error.strerror}") from error
  except ValueError as error:
    raise UserError(f"{short_name(image)!r}: {error}") from error


def _decoded(text: str, image: str) -> io.BufferedIOBase:
  try:
    return io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
  except ValueError as error:
    raise UserError(f"{short_name(image)}: not base64: {error}") from error


@functools.cache
def _downloads() -> tempfile.TemporaryDirectory:
  return tempfile.TemporaryDirectory(prefix="himap_jax_pictures_")


@functools.cache
def _downloaded(url: str) -> pathlib.Path:
  """A local copy of a file on the web, until the process ends; raises `UserError` if it cannot be downloaded."""
  request = urllib.request.Request(url, headers={"User-Agent": "himap_jax"})
  try:
    with (
      urllib.request.urlopen(request, timeout=URL_TIMEOUT) as response,
      tempfile.NamedTemporaryFile(dir=_downloads().name, delete=False) as file,
    ):
      try:
        _copy(response, file)
      except BaseException:
        os.unlink(file.name)
        raise
      return pathlib.Path(file.name)
  except (OSError, ValueError, http.client.HTTPException) as error:
    raise UserError(f"{short_name(url)}: cannot be downloaded ({str(error) or type(error).__name__})") from error


def _copy(response: http.client.HTTPResponse, file: IO[bytes]) -> None:
  """Copies a download within its limits; raises `OSError` or `HTTPException`."""
  end = time.monotonic() + MAX_URL_SECONDS
  while data := response.read1(_COPIED_BYTES):
    file.write(data)
    if file.tell() > MAX_URL_BYTES:
      raise OSError(f"larger than {MAX_URL_BYTES:,} bytes")
    if time.monotonic() > end:
      raise TimeoutError(f"it takes more than {MAX_URL_SECONDS} seconds")
  file.flush()
