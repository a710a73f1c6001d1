"""Reads image files as RGB pictures."""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any

from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin

from himap_jax.errors import UserError
from himap_jax.families.examples import MAX_PIXELS, check_aspect_ratio
from himap_jax.rgb import to_rgb, without_warnings
from himap_jax.run import sources

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
_SIGNATURE_BYTES = 16

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
  return PictureFiles().load(os.fspath(path), max_pixels=max_pixels)[0]


@dataclasses.dataclass(frozen=True)
class PictureFiles:
  """Reads the pictures of prompts; for what may name one see `sources.open_source`."""

  image_dir: pathlib.Path = pathlib.Path()
  allow_urls: bool = False

  def load(self, image: str | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """As `load_image`, with the picture's `digest`."""

    def read(file: io.BufferedIOBase) -> tuple[Image.Image, str]:
      digest = _digest(image, file)
      picture = _open_image(file)
      _limit_size(picture, max_pixels)
      return to_rgb(picture), digest

    return self._read(image, read)

  def size(self, image: str | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """`(width, height)` of what `load` returns, without decoding it; errors as in `load`."""

    def read(file: io.BufferedIOBase) -> tuple[int, int]:
      picture = _open_image(file)
      _limit_size(picture, max_pixels)
      if picture.format == "TIFF":  # of which Pillow gives the size after turning
        return picture.size
      is_turned = False
      with contextlib.suppress(Exception), without_warnings():
        if picture.format == "PNG":
          picture.info = _png_info(file, is_animated=picture.is_animated)
        # That of PNG would decode it.
        is_turned = Image.Image.getexif(picture).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
      return picture.size[::-1] if is_turned else picture.size

    return self._read(image, read)

  def digest(self, image: str | bytes) -> str | None:
    """SHA-256 in hex of a picture's bytes, or of an address on the web; None if the bytes cannot be read."""
    if sources.is_url(image):
      return _digest(image, io.BytesIO())
    try:
      with sources.open_source(image, self.image_dir, allow_urls=self.allow_urls) as file:
        return _digest(image, file)
    except (UserError, OSError):
      return None

  def _read(self, image: str | bytes, read: Callable[[io.BufferedIOBase], Any]) -> Any:
    name = sources.short_name(image)
    try:
      file = sources.open_source(image, self.image_dir, allow_urls=self.allow_urls)
    except UserError as error:
      raise ImageError(str(error)) from error
    with file:
      try:
        return read(file)
      except UserError as error:
        raise ImageError(f"{name}: {error}") from error
      except Exception as error:  # Pillow's readers raise any type on damaged data.
        raise ImageError(f"{name}: damaged image: {str(error) or type(error).__name__}") from error


def _digest(image: str | bytes, file: io.BufferedIOBase) -> str:
  """What identifies a picture: its bytes, or its address on the web, so that it is not downloaded to be compared."""
  own = io.BytesIO(image.encode(errors="surrogatepass")) if sources.is_url(image) else file
  return hashlib.file_digest(own, "sha256").hexdigest()


def _open_image(file: io.BufferedIOBase) -> Image.Image:
  """`Image.open` without its size limit, which a JPEG may exceed here."""
  file.seek(0)
  signature = file.read(_SIGNATURE_BYTES)
  if not signature:
    raise ImageError("the file is empty")
  for name in _FORMATS:
    factory, accept = Image.OPEN.get(name, (None, None))
    if factory and accept and accept(signature) is True:
      file.seek(0)
      with without_warnings():
        return factory(file, "")
  raise ImageError(f"not an image of a supported format ({', '.join(_FORMATS)})")


def _limit_size(image: Image.Image, max_pixels: int) -> None:
  width, height = image.size
  check_aspect_ratio(width, height)
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


def _png_info(file: io.BufferedIOBase, *, is_animated: bool) -> dict[Any, Any]:
  """The metadata of a PNG that Pillow knows when it has decoded the first frame, without decoding it."""
  file.seek(8)  # past the signature
  stream, has_data = PngImagePlugin.PngStream(file), False
  with contextlib.suppress(struct.error, SyntaxError):  # the end of the file, and what is no chunk
    while (chunk := stream.read())[0] != b"IEND":
      kind, start, length = chunk
      if is_animated and has_data and kind == b"fcTL":
        break  # of the second frame
      if kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
        stream.call(*chunk)
      has_data = has_data or kind in (b"IDAT", b"fdAT")
      file.seek(start + length + 4)  # past the checksum
  return stream.im_info
