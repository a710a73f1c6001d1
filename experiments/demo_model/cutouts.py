"""The cut-outs for scenes: kind, name and colour of the thing that each shows.

Kinds come from the folders of the stamps and the subcategories of the emoji, names from their captions, colours from
the pixels. A picture belongs to the train or to the test split, but drawings of one emoji may be in both. Every name
asked for in the test split has occurred in training.
"""

import collections
import functools
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments.demo_model.packages import PACKAGES, fetch

# Folders and subcategories of every kind; pictures there that show something else; final words of captions that are not
# names; and for every colour name its own ranges of hue in degrees, of saturation and of value.
TABLES = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NOT_OF_THEIR_KIND = frozenset(" ".join(TABLES["not_of_their_kind"]).split())
KINDS = tuple(TABLES["stamp_folders"])
COLOUR_NAMES = tuple(dict.fromkeys(name for name, *_ in TABLES["colours"]))
NAMED = 3  # subjects that a word must denote to count as a name
COLOUR_SHARE = 0.7
TEST_SHARE = 5  # one picture in five is a test picture


class Cutout(NamedTuple):
  """A picture of one thing on a transparent ground; `name` is a final caption word for at least `NAMED` subjects."""

  path: pathlib.Path
  kind: str
  name: str | None
  colour: str | None


class Found(NamedTuple):
  """A picture of a package, its subject (shared by all pictures of one thing), and the last word of its caption."""

  path: pathlib.Path
  subject: str
  kind: str
  word: str | None


def load(cache_dir: pathlib.Path) -> dict[str, list[Cutout]]:
  """The cut-outs of the packages in `cache_dir`, by split: see `split`."""
  return split([*_stamps(cache_dir), *_emoji(cache_dir)])


def split(found: Sequence[Found]) -> dict[str, list[Cutout]]:
  """Splits pictures; one in `TEST_SHARE` of each kind is a test picture."""

  def checksum(one: Found) -> int:  # of the file name, wherever the packages are
    return zlib.crc32("/".join(one.path.parts[-3:]).encode())

  subjects = {(one.kind, one.subject): one.word for one in found}
  words = collections.Counter((kind, word) for (kind, _), word in subjects.items())
  splits = {"train": [], "test": []}
  for kind in KINDS:
    alike = sorted((one for one in found if one.kind == kind), key=checksum)
    for index, (path, _, _, word) in enumerate(alike):
      name = word if words[kind, word] >= NAMED and word not in (kind, *TABLES["not_names"]) else None
      splits["train" if index % TEST_SHARE else "test"].append(Cutout(path, kind, name, dominant_colour(path)))
  known = {cutout.name for cutout in splits["train"]}
  splits["test"] = [c if c.name in known else c._replace(name=None) for c in splits["test"]]
  return splits


def _stamps(cache_dir: pathlib.Path) -> list[Found]:
  root = fetch(PACKAGES["stamps"], cache_dir) / "usr/share/tuxpaint/stamps"
  found = []
  for kind, folders in TABLES["stamp_folders"].items():
    for path in itertools.chain.from_iterable(sorted((root / folder).rglob("*.png")) for folder in folders):
      if path.stem in NOT_OF_THEIR_KIND or path.stem.endswith("_mirror") or "toys" in path.parts:
        continue
      caption = path.with_suffix(".txt")
      text = caption.read_text(encoding="utf-8", errors="replace").splitlines()[0] if caption.exists() else ""
      found.append(Found(path, path.name, kind, last_word(text)))
  return found


def _emoji(cache_dir: pathlib.Path) -> list[Found]:
  noto, twemoji, fluent = (fetch(PACKAGES[name], cache_dir) / "package" for name in ("noto", "twemoji", "fluent"))
  kinds = {subcategory: kind for kind, own in TABLES["emoji_subcategories"].items() for subcategory in own}
  found = []
  for entry in json.loads((noto / "emoji.json").read_text(encoding="utf-8")):
    kind = kinds.get(entry["subcategory"])
    if kind is None or entry["short_name"] in NOT_OF_THEIR_KIND:
      continue
    word = last_word(re.sub(r"_face$|\d+$", "", entry["short_name"]).replace("_", " "))
    drawings = [noto / "img/google/64" / entry["image"], twemoji / "img/twitter/64" / entry["image"]]
    drawings.append(fluent / "assets" / f"{entry['unified'].lower()}.webp")
    found += [Found(path, entry["short_name"], kind, word) for path in drawings if path.exists()]
  return found


def last_word(caption: str) -> str | None:
  """The last word of a caption's first clause, such as heron for "A great blue heron."."""
  words = re.findall(r"[a-z]+", re.split(r"[,(.!?]| from | in | with | on ", caption.lower())[0])
  return words[-1] if words else None


def dominant_colour(path: pathlib.Path) -> str | None:
  """The colour of at least `COLOUR_SHARE` of a picture's opaque pixels, or None."""
  picture = read(path).copy()
  picture.thumbnail((96, 96))
  pixels = np.asarray(picture)
  opaque = pixels[..., 3] > 128
  hsv = np.asarray(Image.fromarray(pixels[..., :3]).convert("HSV"), np.float32)[opaque]
  h, s, v = hsv[:, 0] * 360 / 255, hsv[:, 1] / 255, hsv[:, 2] / 255
  names = np.full(h.shape, "", dtype=object)
  for name, (first, last), (least_s, most_s), (least_v, most_v) in TABLES["colours"]:
    inside = ((h - first) % 360 < last - first) & (s >= least_s) & (s < most_s)
    names[inside & (v >= least_v) & (v < most_v)] = name
  name, count = collections.Counter(names.tolist()).most_common(1)[0]
  return name if name and count >= COLOUR_SHARE * opaque.sum() else None


@functools.lru_cache(maxsize=2048)
def read(path: pathlib.Path) -> Image.Image:
  """The picture, cropped to its opaque part, at most 256 pixels wide and high; not to be changed in place."""
  with Image.open(path) as picture:
    picture = picture.convert("RGBA")
  picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
  picture.thumbnail((256, 256))
  return picture
