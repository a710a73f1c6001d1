"""Reads image files as RGB pictures."""

import contextlib
import errno
import hashlib
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin

from himap_jax.errors import UserError

MAX_PIXELS = 178_956_970
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_SIGNATURE_BYTES = 16
_TO_8_BIT = ((np.arange(65536) + 128) // 257).astype(np.uint8)
_warnings_lock = threading.Lock()

Image.init()


class ImageError(UserError):
  """An unusable image file; the message names the file and the reason."""


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
  """Reads a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF file as an RGB picture. Thread-safe.

  The first frame of an animation is used. Transparency is laid on white, 16-bit greyscale is scaled to 8 bits, EXIF
  orientation is applied, and colour profiles are ignored.

  The size is checked before decoding. A baseline JPEG above `max_pixels` is decoded at a half, a quarter or an eighth
  of its size; any other picture above it is refused. Decoding takes up to 16 bytes per pixel.

  Raises:
    ImageError: the file is missing, unreadable, empty, truncated, damaged or too large, has another format or 32-bit
      samples.
  """
  return load_with_digest(path, max_pixels=max_pixels)[0]


def load_with_digest(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
  """As `load_image`, with the SHA-256 in hex of the bytes that were read."""
  with _open_file(path) as file:
    try:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      image = _open_image(file)
      _limit_size(image, max_pixels)
      image.load()
      _turn_upright(image)
      return _to_rgb(image), digest
    except ImageError as error:
      raise ImageError(f"{path}: {error}") from error
    except Exception as error:  # Pillow's readers raise any type on damaged data.
      reason = str(error) or type(error).__name__
      raise ImageError(f"{path}: damaged image: {reason}") from error


def file_digest(path: str | os.PathLike[str]) -> str | None:
  """SHA-256 of a file in hex; None if it cannot be read."""
  try:
    with _open_file(path) as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except (ImageError, OSError):
    return None


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
  try:
    if not stat.S_ISREG(os.stat(path).st_mode):
      raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")
  except OSError as error:
    raise ImageError(f"{path}: {error.strerror}") from error
  except ValueError as error:
    raise ImageError(f"{path!r}: {error}") from error


def _open_image(file: BinaryIO) -> Image.Image:
  """`Image.open` without its size limit, which a JPEG may exceed here."""
  file.seek(0)
  signature = file.read(_SIGNATURE_BYTES)
  if not signature:
    raise ImageError("the file is empty")
  for name in _FORMATS:
    factory, accept = Image.OPEN.get(name, (None, None))
    if factory and accept and accept(signature) is True:
      file.seek(0)
      with _without_warnings():
        return factory(file, "")
  raise ImageError(f"not an image of a supported format ({', '.join(_FORMATS)})")


def _limit_size(image: Image.Image, max_pixels: int) -> None:
  width, height = image.size
  if width * height <= max_pixels:
    return
  if isinstance(image, JpegImagePlugin.JpegImageFile):
    # Decoding a progressive JPEG holds every coefficient in memory at any scale.
    scales = () if "progressive" in image.info else (2, 4, 8)
    for scale in scales:
      if -(-width // scale) * -(-height // scale) <= max_pixels:
        image.draft(None, (width // scale, height // scale))
        break
  if image.width * image.height > max_pixels:
    raise ImageError(f"{width} x {height} = {width * height:,} pixels is above the limit of {max_pixels:,}")


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode == "I" or image.mode.startswith("I;16"):
    return _scale_to_8_bit(image).convert("RGB")
  if image.mode == "F":
    raise ImageError("floating-point samples are not supported")
  if not image.has_transparency_data:
    return image.convert("RGB")
  if image.mode != "RGBA":
    image = image.convert("RGBA")
  opaque = Image.new("RGB", image.size, "white")
  opaque.paste(image.convert("RGB"), mask=image.getchannel("A"))
  return opaque


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
  samples = np.asarray(image)
  if samples.min() < 0 or samples.max() > 65535:
    raise ImageError("samples of 32 bits are not supported")
  scaled = _TO_8_BIT[samples]
  transparent = image.info.get("transparency")
  if transparent is not None:
    scaled[samples == transparent] = 255
  return Image.fromarray(scaled)


def _turn_upright(image: Image.Image) -> None:
  with contextlib.suppress(Exception), _without_warnings():  # Damaged EXIF does not make a picture unusable.
    ImageOps.exif_transpose(image, in_place=True)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
  # Warning filters are global to the process, so only one thread may replace them at a time.
  with _warnings_lock, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield
