"""The cut-outs that scenes are made of: what kind of thing each shows, what it is called, and its colour.

Kinds come from the folders of the stamps and the subcategories of the emoji, names from their captions, colours from the
pixels themselves. A picture belongs to the train or to the test split; what is asked by name in the test split has been seen
by name in training, in another picture.
"""

import collections
import functools
import json
import pathlib
import re
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments import scene_packages

STAMP_KINDS = {
  "animals/mammals": "animal",
  "animals/marsupials": "animal",
  "animals/birds": "animal",
  "animals/insects": "insect",
  "food/fruit": "food",
  "food/vegetables": "food",
  "plants/flowers": "flower",
  "vehicles": "vehicle",
  "town/houses": "building",
}
EMOJI_KINDS = {
  "animal-mammal": "animal",
  "animal-bird": "animal",
  "animal-bug": "insect",
  "food-fruit": "food",
  "food-vegetable": "food",
  "plant-flower": "flower",
  "transport-ground": "vehicle",
  "transport-air": "vehicle",
  "transport-water": "vehicle",
  "place-building": "building",
}
KINDS = tuple(dict.fromkeys(STAMP_KINDS.values()))

NOT_OF_THEIR_KIND = frozenset(
  "7spoke256 wheel_tractor sedan_police trainSign wings spider_computer spider_fly spider_football Brown_slug Woodlouse "
  "xanthia sea_lion penguin_with_spider snail snail2 cave_entrance city pig_nose feet feather wing hatching_chick spider_web "
  "microbe worm rosette bouquet traffic_light vertical_traffic_light construction rotating_light octagonal_sign wheel "
  "oil_drum motorway railway_track skateboard roller_skate motorized_wheelchair manual_wheelchair fuelpump busstop station "
  "mountain_railway parachute seat satellite anchor ring_buoy airplane_departure airplane_arriving flying_saucer "
  "building_construction stadium wedding bricks rock wood statue_of_liberty".split()
)

NOT_NAMES = frozenset("engine flowers office store".split())  # the last words of captions that do not say what it is

COLOURS = {  # hue in degrees up to which a saturated, bright pixel has the colour
  "red": 14,
  "orange": 40,
  "yellow": 68,
  "green": 165,
  "blue": 255,
  "purple": 295,
  "pink": 340,
}
NAMED = 3  # pictures that a word must name to be asked for
COLOUR_NAMES = (*COLOURS, "brown", "gray", "white", "black")
COLOUR_SHARE = 0.7
TEST_SHARE = 5  # one picture of so many is a test picture


class Cutout(NamedTuple):
  """A picture of one thing on a transparent ground.

  Attributes:
    path: a PNG file.
    kind: one of `KINDS`.
    name: what it is called where its caption says so in a word that names `NAMED` pictures or more, else None.
    colour: the colour of most of it, or None.
  """

  path: pathlib.Path
  kind: str
  name: str | None
  colour: str | None


def load(cache_dir: pathlib.Path) -> dict[str, list[Cutout]]:
  """All cut-outs of the splits `train` and `test`."""
  found = _stamps(scene_packages.fetch(scene_packages.STAMPS, cache_dir))
  found += _emoji(scene_packages.fetch(scene_packages.EMOJI, cache_dir))
  words = collections.Counter((kind, word) for _, kind, word in found)
  splits = {"train": [], "test": []}
  for kind in KINDS:
    alike = sorted((entry for entry in found if entry[1] == kind), key=lambda entry: zlib.crc32(entry[0].name.encode()))
    for index, (path, _, word) in enumerate(alike):
      name = word if words[kind, word] >= NAMED and word not in (kind, *NOT_NAMES) else None
      splits["train" if index % TEST_SHARE else "test"].append(Cutout(path, kind, name, _colour(path)))
  known = {cutout.name for cutout in splits["train"]}
  splits["test"] = [c if c.name in known else c._replace(name=None) for c in splits["test"]]
  return splits


def _stamps(folder: pathlib.Path) -> list[tuple[pathlib.Path, str, str | None]]:
  root = folder / "usr/share/tuxpaint/stamps"
  found = []
  for part, kind in STAMP_KINDS.items():
    for path in sorted((root / part).rglob("*.png")):
      if path.stem in NOT_OF_THEIR_KIND or path.stem.endswith("_mirror") or "toys" in path.parts:
        continue
      caption = path.with_suffix(".txt")
      text = caption.read_text(encoding="utf-8", errors="replace").splitlines()[0] if caption.exists() else ""
      found.append((path, kind, _last_word(text)))
  return found


def _emoji(folder: pathlib.Path) -> list[tuple[pathlib.Path, str, str | None]]:
  root = folder / "package"
  found = []
  for entry in json.loads((root / "emoji.json").read_text(encoding="utf-8")):
    kind = EMOJI_KINDS.get(entry["subcategory"])
    path = root / "img/google/64" / entry["image"]
    if kind is None or entry["short_name"] in NOT_OF_THEIR_KIND or not path.exists():
      continue
    found.append((path, kind, _last_word(re.sub(r"_face$|\d+$", "", entry["short_name"]).replace("_", " "))))
  return found


def _last_word(caption: str) -> str | None:
  """The last word of a caption's first clause: "A great blue heron." names a heron."""
  words = re.findall(r"[a-z]+", re.split(r"[,(.!?]| from | in | with | on ", caption.lower())[0])
  return words[-1] if words else None


def _colour(path: pathlib.Path) -> str | None:
  picture = read(path)
  picture.thumbnail((96, 96))
  pixels = np.asarray(picture)
  opaque = pixels[..., 3] > 128
  h, s, v = np.moveaxis(np.asarray(Image.fromarray(pixels[..., :3]).convert("HSV"), np.float32)[opaque], -1, 0)
  h, s, v = h * 360 / 255, s / 255, v / 255
  names = np.full(h.shape, "red", dtype=object)
  for name, upper in reversed(COLOURS.items()):
    names[h < upper] = name
  names[((names == "orange") | (names == "red")) & (v < 0.6) & (s > 0.2)] = "brown"
  names[(s < 0.15) & (v >= 0.35)] = "gray"
  names[(s < 0.12) & (v > 0.85)] = "white"
  names[v < 0.25] = "black"
  name, count = collections.Counter(names.tolist()).most_common(1)[0]
  return name if count >= COLOUR_SHARE * opaque.sum() else None


@functools.lru_cache(maxsize=2048)
def _pixels(path: pathlib.Path) -> Image.Image:
  with Image.open(path) as picture:
    picture = picture.convert("RGBA")
  picture = picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
  picture.thumbnail((256, 256))
  return picture


def read(path: pathlib.Path) -> Image.Image:
  """The picture, cropped to what is opaque, at most 256 pixels wide and high."""
  return _pixels(path).copy()
