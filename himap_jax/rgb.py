"""Pictures of any mode as RGB."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from himap_jax.errors import UserError

_TO_8_BIT = ((np.arange(65536) + 128) // 257).astype(np.uint8)
UPRIGHT = 1  # EXIF's orientation
_warnings_lock = threading.Lock()


def to_rgb(image: Image.Image) -> Image.Image:
  """The picture, or the current frame of an animation, as a new one in RGB. Thread-safe.

  EXIF orientation is applied, transparency is laid on white, 16-bit greyscale is scaled to 8 bits, and colour profiles
  are ignored.

  Raises:
    UserError: the picture is damaged, or has floating-point or 32-bit samples.
  """
  try:
    image.load()
    picture = _converted(image)
  except UserError:
    raise
  except Exception as error:  # Pillow's readers raise any type on damaged data.
    raise UserError(f"damaged image: {str(error) or type(error).__name__}") from error
  picture.info = {}
  with contextlib.suppress(Exception), without_warnings():  # Damaged EXIF does not make a picture unusable.
    picture.getexif()[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    ImageOps.exif_transpose(picture, in_place=True)
  return picture


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
  """Without Python's warnings, in one thread at a time: their filters are global to the process."""
  with _warnings_lock, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


def _converted(image: Image.Image) -> Image.Image:
  if image.mode == "I" or image.mode.startswith("I;16"):
    return _scale_to_8_bit(image).convert("RGB")
  if image.mode == "F":
    raise UserError("floating-point samples are not supported")
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
    raise UserError("samples of 32 bits are not supported")
  scaled = _TO_8_BIT[samples]
  transparent = image.info.get("transparency")
  if transparent is not None:
    scaled[samples == transparent] = 255
  return Image.fromarray(scaled)
