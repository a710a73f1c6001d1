"""The cut-outs that scenes are made of: what kind of thing each shows, what it is called, and its colour.

Kinds come from the folders of the stamps and the subcategories of the emoji, names from their captions, colours from the
pixels themselves. A picture belongs to the train or to the test split; of an emoji, which three hands have drawn, one drawing
may be in one split and one in the other. What is asked by name in the test split has been seen by name in training.
"""

import collections
import functools
import json
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from experiments import scene_packages

STAMP_KINDS = {
  "animals/mammals": "animal",
  "animals/marsupials": "animal",
  "animals/birds": "animal",
  "animals/fish": "animal",
  "animals/amphibians": "animal",
  "animals/insects": "animal",
  "food/fruit": "food",
  "food/vegetables": "food",
  "food/nuts": "food",
  "plants/flowers": "plant",
  "plants/trees": "plant",
  "vehicles": "vehicle",
  "town/houses": "building",
  "clothes": "clothing",
}
EMOJI_KINDS = {
  "animal-mammal": "animal",
  "animal-bird": "animal",
  "animal-marine": "animal",
  "animal-reptile": "animal",
  "animal-amphibian": "animal",
  "animal-bug": "animal",
  "food-fruit": "food",
  "food-vegetable": "food",
  "food-prepared": "food",
  "food-asian": "food",
  "food-sweet": "food",
  "plant-flower": "plant",
  "plant-other": "plant",
  "transport-ground": "vehicle",
  "transport-air": "vehicle",
  "transport-water": "vehicle",
  "place-building": "building",
  "place-religious": "building",
  "clothing": "clothing",
}
KINDS = tuple(dict.fromkeys(STAMP_KINDS.values()))

NOT_OF_THEIR_KIND = frozenset(
  "7spoke256 wheel_tractor sedan_police trainSign wings spider_computer spider_fly spider_football Brown_slug Woodlouse "
  "xanthia sea_lion penguin_with_spider snail2 pig_nose feet feather wing hatching_chick spider_web "
  "microbe worm rosette bouquet traffic_light vertical_traffic_light construction rotating_light octagonal_sign wheel "
  "oil_drum motorway railway_track skateboard roller_skate motorized_wheelchair manual_wheelchair fuelpump busstop station "
  "mountain_railway parachute seat satellite anchor ring_buoy airplane_departure airplane_arriving flying_saucer "
  "building_construction stadium wedding bricks rock wood statue_of_liberty shell oyster coral kaaba "
  "salt canned_food bowl_with_spoon butter takeout_box fondue fish_cake bento honey_pot empty_nest nest_with_eggs mushroom "
  "holly_leaves pinecone rambutan hut button clothespin_new clothespin_old school_satchel mortar_board crown eyeglasses purse "
  "handbag pouch lipstick ring gem prayer_beads dark_sunglasses shopping_bags goggles folding_hand_fan hair_pick "
  "helmet_with_white_cross".split()
)

NOT_NAMES = frozenset("engine flowers office store".split())  # the last words of captions that do not say what it is


class Colour(NamedTuple):
  """A colour that everybody would call so, and no other: hues in degrees, saturations and values in shares."""

  name: str
  hue: tuple[int, int]
  saturation: tuple[float, float]
  value: tuple[float, float]


COLOURS = (  # between them are pixels without a name
  Colour("red", (345, 374), (0.6, 1.01), (0.5, 1.01)),
  Colour("pink", (310, 345), (0.2, 1.01), (0.7, 1.01)),
  Colour("pink", (345, 374), (0.18, 0.45), (0.85, 1.01)),
  Colour("orange", (16, 40), (0.75, 1.01), (0.8, 1.01)),
  Colour("brown", (8, 45), (0.3, 1.01), (0.2, 0.6)),
  Colour("yellow", (42, 66), (0.45, 1.01), (0.7, 1.01)),
  Colour("green", (75, 165), (0.25, 1.01), (0.25, 1.01)),
  Colour("blue", (180, 250), (0.35, 1.01), (0.35, 1.01)),
  Colour("purple", (260, 300), (0.25, 1.01), (0.3, 1.01)),
  Colour("gray", (0, 360), (0.0, 0.18), (0.35, 0.82)),
  Colour("white", (0, 360), (0.0, 0.1), (0.9, 1.01)),
  Colour("black", (0, 360), (0.0, 1.01), (0.0, 0.22)),
)
COLOUR_NAMES = tuple(dict.fromkeys(colour.name for colour in COLOURS))
NAMED = 3  # subjects that a word must name to be asked for
COLOUR_SHARE = 0.7
TEST_SHARE = 5  # one picture of so many is a test picture


class Cutout(NamedTuple):
  """A picture of one thing on a transparent ground.

  Attributes:
    path: a PNG or WebP file.
    kind: one of `KINDS`.
    name: what it is called where its caption says so in a word that names `NAMED` subjects or more, else None.
    colour: the colour of most of it, or None.
  """

  path: pathlib.Path
  kind: str
  name: str | None
  colour: str | None


class Found(NamedTuple):
  """A picture as its package has it.

  Attributes:
    path: a PNG or WebP file.
    subject: what the pictures of one thing share.
    kind: one of `KINDS`.
    word: the last word of its caption.
  """

  path: pathlib.Path
  subject: str
  kind: str
  word: str | None


def load(cache_dir: pathlib.Path) -> dict[str, list[Cutout]]:
  """All cut-outs of the splits `train` and `test`."""
  return split([*_stamps(cache_dir), *_emoji(cache_dir)])


def split(found: Sequence[Found]) -> dict[str, list[Cutout]]:
  """Splits pictures, of each kind one of `TEST_SHARE` into the test split."""
  subjects = {(one.kind, one.subject): one.word for one in found}
  words = collections.Counter((kind, word) for (kind, _), word in subjects.items())
  splits = {"train": [], "test": []}
  for kind in KINDS:
    alike = sorted((one for one in found if one.kind == kind), key=lambda one: zlib.crc32(_file(one.path).encode()))
    for index, (path, _, _, word) in enumerate(alike):
      name = word if words[kind, word] >= NAMED and word not in (kind, *NOT_NAMES) else None
      splits["train" if index % TEST_SHARE else "test"].append(Cutout(path, kind, name, _colour(path)))
  known = {cutout.name for cutout in splits["train"]}
  splits["test"] = [c if c.name in known else c._replace(name=None) for c in splits["test"]]
  return splits


def _file(path: pathlib.Path) -> str:
  """Tells files apart wherever the packages lie."""
  return "/".join(path.parts[-3:])


def _stamps(cache_dir: pathlib.Path) -> list[Found]:
  root = scene_packages.fetch(scene_packages.STAMPS, cache_dir) / "usr/share/tuxpaint/stamps"
  found = []
  for part, kind in STAMP_KINDS.items():
    for path in sorted((root / part).rglob("*.png")):
      if path.stem in NOT_OF_THEIR_KIND or path.stem.endswith("_mirror") or "toys" in path.parts:
        continue
      caption = path.with_suffix(".txt")
      text = caption.read_text(encoding="utf-8", errors="replace").splitlines()[0] if caption.exists() else ""
      found.append(Found(path, path.name, kind, _last_word(text)))
  return found


def _emoji(cache_dir: pathlib.Path) -> list[Found]:
  noto, twemoji, fluent = (
    scene_packages.fetch(package, cache_dir) / "package"
    for package in (scene_packages.NOTO, scene_packages.TWEMOJI, scene_packages.FLUENT)
  )
  found = []
  for entry in json.loads((noto / "emoji.json").read_text(encoding="utf-8")):
    kind = EMOJI_KINDS.get(entry["subcategory"])
    if kind is None or entry["short_name"] in NOT_OF_THEIR_KIND:
      continue
    word = _last_word(re.sub(r"_face$|\d+$", "", entry["short_name"]).replace("_", " "))
    for path in (
      noto / "img/google/64" / entry["image"],
      twemoji / "img/twitter/64" / entry["image"],
      fluent / "assets" / f"{entry['unified'].lower()}.webp",
    ):
      if path.exists():
        found.append(Found(path, entry["short_name"], kind, word))
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
  names = np.full(h.shape, "", dtype=object)
  for colour in COLOURS:
    (first, last), saturation, value = colour.hue, colour.saturation, colour.value
    inside = ((h - first) % 360 < last - first) & (s >= saturation[0]) & (s < saturation[1])
    names[inside & (v >= value[0]) & (v < value[1])] = colour.name
  name, count = collections.Counter(names.tolist()).most_common(1)[0]
  return name if name and count >= COLOUR_SHARE * opaque.sum() else None


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
