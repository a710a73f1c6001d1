"""Pictures of a caller in any mode."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from himap_jax import UserError
from himap_jax.rgb import to_rgb


def picture(mode):
  """Two pixels, black and white."""
  return Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes(mode):
  converted = to_rgb(picture(mode))
  assert converted.mode == "RGB" and np.asarray(converted).tolist() == [[[0] * 3, [255] * 3]]


def test_16_bits_and_transparency():
  assert np.asarray(to_rgb(Image.fromarray(np.array([[0, 257 * 7]], np.uint16)))).tolist() == [[[0] * 3, [7] * 3]]
  clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
  assert np.asarray(to_rgb(clear)).tolist() == [[[255] * 3] * 2]
  with pytest.raises(UserError, match="floating-point samples are not supported"):
    to_rgb(Image.new("F", (2, 1)))
  with pytest.raises(UserError, match="samples of 32 bits are not supported"):
    to_rgb(Image.new("I", (2, 1), 1 << 20))


def test_a_picture_is_turned_once_and_itself_left_alone():
  exif, file = Image.Exif(), io.BytesIO()
  exif[ExifTags.Base.Orientation] = 6
  Image.new("RGB", (5, 3), "red").save(file, "JPEG", exif=exif)
  for own in (Image.open(file), Image.open(file).convert("RGB")):
    turned = to_rgb(own)
    assert turned.size == to_rgb(turned).size == (3, 5)
    assert own.size == (5, 3) and own.getexif() == exif


def test_a_damaged_file():
  file = io.BytesIO()
  Image.effect_noise((64, 48), 90).save(file, "PNG")
  with pytest.raises(UserError, match="^damaged image: .*truncated"):
    to_rgb(Image.open(io.BytesIO(file.getvalue()[:500])))
