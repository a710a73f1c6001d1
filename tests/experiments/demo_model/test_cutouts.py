"""Cut-outs: their names, splits and colours, and the packages that they come from."""

import hashlib
import tarfile
from concurrent import futures

import pytest
from PIL import Image

from experiments.demo_model import cutouts, packages
from himap_jax.errors import UserError


def test_last_word_of_a_caption():
  assert cutouts.last_word("A great blue heron.") == "heron"
  assert cutouts.last_word("A peacock (a male peafowl).") == "peacock"
  assert cutouts.last_word("") is None


def test_split_by_picture(tmp_path):
  found = []
  for index in range(60):
    path = tmp_path / f"{index}.png"
    Image.new("RGBA", (9, 9), (200, 30, 30, 255)).save(path)
    kind = ("animal", "food")[index % 2]
    word = "dog" if index < 20 else "rare" if index == 21 else kind
    found.append(cutouts.Found(path, f"subject {index // 4 if index < 20 else index}", kind, word))
  splits = cutouts.split(found)
  paths = {name: [cutout.path for cutout in own] for name, own in splits.items()}
  assert sorted(paths["train"] + paths["test"]) == sorted(one.path for one in found)
  assert {kind: sum(c.kind == kind for c in splits["test"]) for kind in ("animal", "food")} == {"animal": 6, "food": 6}
  names = {c.path: c.name for own in splits.values() for c in own}
  only_in_test = [
    one._replace(word="owl", subject=f"owl {i}") if one.path in paths["test"][:6] else one
    for i, one in enumerate(found)
  ]
  assert all(c.name is None for c in cutouts.split(only_in_test)["test"] if c.kind == "animal" and c.name != "dog")
  for one in found:  # five subjects share "dog"; a word for one subject, or the kind itself, is no name
    assert names[one.path] == ("dog" if one.word == "dog" else None)


@pytest.mark.parametrize(
  "colour, rgb",
  [
    ("red", (220, 20, 20)), ("pink", (244, 171, 186)), ("pink", (255, 105, 180)), ("orange", (255, 140, 0)),
    ("brown", (101, 67, 33)), ("yellow", (255, 220, 40)), ("green", (30, 130, 60)), ("blue", (30, 60, 220)),
    ("purple", (128, 60, 200)), ("gray", (153, 170, 181)), ("white", (250, 250, 250)), ("black", (20, 20, 20)),
    (None, (77, 77, 77)), (None, (210, 180, 140)), (None, (255, 165, 120)), (None, (200, 225, 235)),
  ],
)  # fmt: skip
def test_colour_of_most_pixels(tmp_path, colour, rgb):
  path = tmp_path / f"{colour}.png"
  picture = Image.new("RGBA", (50, 50), (*rgb, 255))
  picture.save(path)
  assert cutouts.dominant_colour(path) == colour
  picture.paste((20, 160, 20, 255) if colour != "green" else (200, 20, 20, 255), (0, 0, 25, 50))
  picture.save(tmp_path / "half.png")
  assert cutouts.dominant_colour(tmp_path / "half.png") is None


def package(**changes) -> packages.Package:
  return packages.Package("p", "1", "p.tgz", "", ("false",), ("tar", "-xzf", "{file}"))._replace(**changes)


def downloaded(tmp_path):
  """A cache folder with a package's archive in it, and the archive's digest."""
  source, cache = tmp_path / "source", tmp_path / "cache"
  (source / "a").mkdir(parents=True)
  (source / "a" / "b").write_text("hello\n")
  cache.mkdir()
  with tarfile.open(cache / "p.tgz", "w:gz") as archive:
    archive.add(source / "a", "a")
  return cache, hashlib.sha256((cache / "p.tgz").read_bytes()).hexdigest()


def test_package_is_taken_from_the_cache_and_checked(tmp_path):
  cache, sha256 = downloaded(tmp_path)
  with pytest.raises(UserError, match="sha256 differs"):
    packages.fetch(package(sha256="0" * 64), cache)
  assert not (cache / "p-1").exists()
  folder = packages.fetch(package(sha256=sha256), cache)
  assert (folder / "a" / "b").read_text() == "hello\n"
  assert sorted(path.name for path in cache.iterdir()) == ["p-1", "p.tgz"]


def test_package_is_unpacked_once_by_two_at_the_same_time(tmp_path):
  cache, sha256 = downloaded(tmp_path)
  slow = package(sha256=sha256, unpack=("sh", "-c", "echo >> ../unpacked; sleep 1; tar -xzf {file}"))
  with futures.ThreadPoolExecutor() as pool:
    first, second = pool.map(lambda _: packages.fetch(slow, cache), range(2))
  assert first == second
  assert (first / "a" / "b").read_text() == "hello\n"
  assert (cache / "unpacked").read_text() == "\n"


@pytest.mark.parametrize("download", [("false",), ("no-such-command-here",)])
def test_package_that_cannot_be_downloaded_says_what_to_do(tmp_path, download):
  with pytest.raises(UserError, match=r"put p\.tgz into"):
    packages.fetch(package(download=download), tmp_path / "cache")
