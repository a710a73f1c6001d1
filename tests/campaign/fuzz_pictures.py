"""Pictures in every format that is read, damaged in their bytes and headers."""

import base64
import collections
import functools
import io
import pathlib

import numpy as np
from campaign import bounded, mutations
from campaign.trials import Part, Trial
from PIL import Image

from himap_jax.run.pictures import ImageError, PictureFiles

INPUTS = 100
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MODES = {
  "JPEG": ("RGB", "L", "CMYK"),
  "PNG": ("RGB", "RGBA", "P", "I;16", "1", "LA"),
  "TIFF": ("RGB", "L", "I;16", "CMYK"),
}
OPTIONS = {
  "JPEG": (
    {},
    {"progressive": True},
    {"exif": bytes.fromhex("45786966000049492a000800000001001201030001000000060000000000")},
  ),
  "TIFF": ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "packbits"}),
  "GIF": ({}, {"save_all": True, "append_images": [Image.new("RGB", (9, 9), "red")]}),
  "WEBP": ({}, {"lossless": True}),
}


def prepare(kept: pathlib.Path) -> Trial:
  return bounded.trial(_attempts, INPUTS, kept)


@functools.cache
def valid(name: str, mode: str, option: int) -> bytes:
  """A small picture in a format."""
  samples = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
  picture = Image.fromarray(samples)
  picture = Image.fromarray(samples[..., 0].astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
  file = io.BytesIO()
  picture.save(file, format=name, **OPTIONS.get(name, ({},))[option])
  return file.getvalue()


def _attempts(random: np.random.Generator, directory: pathlib.Path, count: int) -> collections.Counter[str]:
  def damaged(number: int) -> str:
    del number
    name = str(random.choice(FORMATS))
    mode, option = str(random.choice(MODES.get(name, ("RGB",)))), int(random.integers(len(OPTIONS.get(name, ({},)))))
    data = mutations.mutated(random, valid(name, mode, option), valid(str(random.choice(FORMATS)), "RGB", 0))
    (directory / "picture").write_bytes(data)
    forms = {"file": "picture", "bytes": data, "url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    return _read(PictureFiles(directory), forms[str(random.choice(list(forms)))])

  return bounded.each(range(count), damaged)


def _read(files: PictureFiles, image: str | bytes) -> str:
  size = None
  try:
    size = files.size(image)
    picture, digest = files.load(image)
  except ImageError as error:
    assert "MemoryError" not in str(error) and "\n" not in str(error), error
    return "damaged, but its size is read" if size else "refused"
  assert picture.mode == "RGB" and picture.size == size and digest == files.digest(image)
  return "read"


PART = Part("Damaged pictures are read or refused, in one line, within 3 GiB.", prepare, INPUTS)
