import concurrent.futures
import hashlib
import io
import itertools
import os
import struct
import tracemalloc
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from himap_jax.errors import UserError
from himap_jax.run.pictures import ImageError, PictureFiles, load_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def photo(size=(64, 48)):
  x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
  picture = np.stack([x, y, 0.5 * np.sin(9 * x * y) + 0.5], axis=-1)
  return Image.fromarray((255 * picture).astype(np.uint8))


def png_chunk(name, data):
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, bit_depth, colour_type, raw, extra=b""):
  """A PNG written by hand from its already filtered rows."""
  header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0))
  data = png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + header + extra + data


def assert_error(path, *expected, **options):
  with pytest.raises(ImageError) as caught:
    load_image(path, **options)
  message = str(caught.value)
  assert isinstance(caught.value, UserError)
  assert os.fspath(path).replace("\0", "\\x00") in message
  assert "\n" not in message
  for text in expected:
    assert text in message


@pytest.mark.parametrize(
  ("format", "mode"),
  [
    (format, mode)
    for format, modes in {"PNG": "RGB L 1 P", "BMP": "RGB L 1 P", "TIFF": "RGB L 1 P", "PPM": "RGB L 1"}.items()
    for mode in modes.split()
  ],
)
def test_lossless_formats(tmp_path, format, mode):
  picture = photo().convert(mode)
  picture.save(tmp_path / "picture", format=format)
  loaded = load_image(tmp_path / "picture")
  assert loaded.mode == "RGB"
  np.testing.assert_array_equal(loaded, picture.convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats(tmp_path, format):
  photo().save(tmp_path / "picture", format=format, quality=95)
  difference = np.asarray(load_image(tmp_path / "picture"), int) - np.asarray(photo())
  assert np.abs(difference).mean() < 4


@pytest.mark.parametrize(
  ("make", "expected"),
  [
    (lambda path: None, "No such file"),
    (lambda path: path.mkdir(), "not a regular file"),
    (lambda path: os.mkfifo(path), "not a regular file"),
    (lambda path: path.write_bytes(b""), "the file is empty"),
    (lambda path: path.write_text("hello, not a picture"), "not an image"),
    (lambda path: path.write_bytes(b"\0" * 500), "not an image"),
    (lambda path: path.write_text("<svg xmlns='x'/>"), "not an image"),
    (lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), "not an image"),
    (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "damaged"),
    (lambda path: path.write_bytes(b"\xff\xd8\xff"), "damaged"),
    (lambda path: path.write_bytes(b"GIF89a"), "damaged"),
    (lambda path: path.write_bytes(b"BM" + b"\xff" * 60), "damaged"),
    (lambda path: path.write_bytes(b"II*\0" + b"\xff" * 60), "damaged"),
    (lambda path: path.write_bytes(png(0, 5, 8, 2, b"")), "damaged"),
  ],
)
def test_unusable_files(tmp_path, make, expected):
  path = tmp_path / "picture.png"
  make(path)
  assert_error(path, expected)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 900])
def test_impossible_path(tmp_path, name):
  assert_error(f"{tmp_path}/{name}")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_anywhere(tmp_path, format):
  whole = io.BytesIO()
  photo((40, 30)).save(whole, format=format)
  data = whole.getvalue()
  path = tmp_path / "picture"
  path.write_bytes(data)
  expected = np.asarray(load_image(path))
  path.write_bytes(data[: len(data) // 2])
  assert_error(path, "damaged image")
  for length in range(1, len(data), 7):
    path.write_bytes(data[:length])
    try:
      loaded = np.asarray(load_image(path))
    except ImageError:
      continue
    np.testing.assert_array_equal(loaded, expected)


def test_damaged_bytes_raise_nothing_else(tmp_path):
  random = np.random.default_rng(0)
  path = tmp_path / "picture"
  for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
    whole = io.BytesIO()
    photo((24, 16)).save(whole, format=format)
    for _ in range(40):
      data = bytearray(whole.getvalue())
      for position in random.integers(0, len(data), 6):
        data[position] = random.integers(256)
      path.write_bytes(data)
      try:
        assert load_image(path, max_pixels=10_000).mode == "RGB"
      except ImageError:
        pass


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(tmp_path, format):
  frames = [Image.new("RGB", (20, 10), colour) for colour in (RED, GREEN, BLUE)]
  options = {"lossless": True} if format == "WEBP" else {}
  frames[0].save(tmp_path / "picture", format=format, save_all=True, append_images=frames[1:], **options)
  with Image.open(tmp_path / "picture") as image:
    assert image.n_frames == 3
  loaded = np.asarray(load_image(tmp_path / "picture"))
  np.testing.assert_array_equal(loaded, np.full((10, 20, 3), RED))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_greyscale_is_scaled(tmp_path, format):
  values = np.array([[0, 128, 129, 255, 256, 257, 32768, 32896, 65406, 65407, 65535]])
  expected = [0, 0, 1, 1, 1, 1, 128, 128, 254, 255, 255]
  Image.fromarray(values.astype(np.uint16)).save(tmp_path / "picture", format=format)
  loaded = np.asarray(load_image(tmp_path / "picture"))
  assert loaded.shape == (1, 11, 3)
  np.testing.assert_array_equal(loaded, np.array([expected])[..., None].repeat(3, -1))


def test_big_endian_tiff_and_16_bit_pgm(tmp_path):
  samples = np.array([0, 32768, 65535], ">u2").tobytes()
  tags = [(256, 4, 3), (257, 4, 1), (258, 3, 16 << 16), (259, 3, 1 << 16)]
  tags += [(262, 3, 1 << 16), (273, 4, 8), (278, 4, 1), (279, 4, 6)]
  directory = b"".join(struct.pack(">HHII", tag, kind, 1, v) for tag, kind, v in tags)
  tiff = b"MM\0*" + struct.pack(">I", 14) + samples
  tiff += struct.pack(">H", len(tags)) + directory + b"\0\0\0\0"
  (tmp_path / "a.tif").write_bytes(tiff)
  (tmp_path / "a.pgm").write_bytes(b"P5 3 1 65535\n" + samples)
  for name in ("a.tif", "a.pgm"):
    loaded = np.asarray(load_image(tmp_path / name))
    assert loaded[0, :, 0].tolist() == [0, 128, 255]


def test_16_bit_rgb_png(tmp_path):
  pixels = np.array([[65535, 0, 32896], [0, 65535, 257]], ">u2").tobytes()
  (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, b"\0" + pixels))
  assert np.asarray(load_image(tmp_path / "a.png")).tolist() == [[[255, 0, 128], [0, 255, 1]]]


@pytest.mark.parametrize("values", [np.int32([[0, 70_000]]), np.float32([[0, 0.5]])])
def test_32_bit_samples_are_refused(tmp_path, values):
  Image.fromarray(values).save(tmp_path / "a.tif")
  assert_error(tmp_path / "a.tif", "not supported")


@pytest.mark.parametrize(
  ("inks", "expected"),
  [
    ((0, 0, 0, 0), WHITE),
    ((0, 255, 255, 0), RED),
    ((255, 0, 255, 0), GREEN),
    ((0, 0, 0, 255), (0, 0, 0)),
    ((0, 0, 0, 127), (128, 128, 128)),
  ],
)
@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, format, inks, expected):
  Image.new("CMYK", (16, 16), inks).save(tmp_path / "picture", format=format)
  loaded = np.asarray(load_image(tmp_path / "picture"), int)
  assert np.abs(loaded - expected).max() <= 3


@pytest.mark.parametrize("transparency", [1, b"\xff\x00", b"\xff\x80"])
def test_palette_with_transparency(tmp_path, transparency):
  picture = Image.new("P", (2, 1))
  picture.putpalette([*RED, *BLUE])
  picture.putdata([0, 1])
  picture.save(tmp_path / "a.png", transparency=transparency)
  red, other = np.asarray(load_image(tmp_path / "a.png"))[0].tolist()
  assert red == [*RED]
  half_blue = [127, 127, 255]
  assert other == (half_blue if transparency == b"\xff\x80" else [*WHITE])


def test_transparent_gif(tmp_path):
  picture = Image.new("P", (2, 1))
  picture.putpalette([*RED, *BLUE])
  picture.putdata([0, 1])
  picture.save(tmp_path / "a.gif", transparency=1)
  assert np.asarray(load_image(tmp_path / "a.gif"))[0].tolist() == [[*RED], [*WHITE]]


def test_alpha_is_laid_on_white(tmp_path):
  alpha = np.array([[0, 51, 128, 255]], np.uint8)
  colour = np.array([10, 200, 90], np.uint8)
  rgba = np.concatenate([np.tile(colour, (1, 4, 1)), alpha[..., None]], axis=-1)
  share = alpha[..., None] / 255
  Image.fromarray(rgba).save(tmp_path / "a.png")
  expected = colour * share + 255 * (1 - share)
  assert np.abs(np.asarray(load_image(tmp_path / "a.png")) - expected).max() <= 1

  grey = np.stack([np.full_like(alpha, 10), alpha], axis=-1)
  Image.fromarray(grey, "LA").save(tmp_path / "b.png")
  expected = 10 * share + 255 * (1 - share)
  assert np.abs(np.asarray(load_image(tmp_path / "b.png")) - expected).max() <= 1


@pytest.mark.parametrize(
  ("bit_depth", "colour_type", "raw", "key"),
  [
    (8, 0, b"\x00\x00\x14", struct.pack(">H", 20)),
    (16, 0, b"\x00\x00\x00\x00\x14", struct.pack(">H", 20)),
    (8, 2, b"\x00\x00\x00\x00\x14\x15\x16", struct.pack(">HHH", 20, 21, 22)),
    (1, 0, b"\x00\x40", struct.pack(">H", 1)),
  ],
)
def test_transparent_colour_key(tmp_path, bit_depth, colour_type, raw, key):
  data = png(2, 1, bit_depth, colour_type, raw, png_chunk(b"tRNS", key))
  (tmp_path / "a.png").write_bytes(data)
  loaded = np.asarray(load_image(tmp_path / "a.png"))
  assert loaded[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
  ("orientation", "turn"),
  [
    (1, lambda a: a),
    (2, np.fliplr),
    (3, lambda a: np.rot90(a, 2)),
    (4, np.flipud),
    (5, lambda a: a.swapaxes(0, 1)),
    (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
    (8, np.rot90),
    (99, lambda a: a),
  ],
)
def test_exif_orientation(tmp_path, format, orientation, turn):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  pixels = np.zeros((32, 48, 3), np.uint8)
  pixels[:16, :16] = RED
  pixels[:16, 32:] = GREEN
  options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
  Image.fromarray(pixels).save(tmp_path / "picture", format=format, exif=exif, **options.get(format, {}))
  loaded = np.asarray(load_image(tmp_path / "picture"), int)
  assert loaded.shape == turn(pixels).shape
  assert np.abs(loaded - turn(pixels)).max() <= 8


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
  "exif", [b"II*\0\x08\0\0\0\x05\0" + b"\x1a\x01\x05\x00\xff\xff\xff\x7f" * 3, b"not a TIFF header", b"MM\0*"]
)
def test_damaged_exif_is_ignored_without_a_warning(tmp_path, format, exif):
  photo().save(tmp_path / "picture", format=format, exif=b"Exif\0\0" + exif)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert load_image(tmp_path / "picture").size == (64, 48)
  assert not caught


def ifd(*entries):
  """EXIF with the tags of one directory, each with its four bytes of value or offset."""
  tags = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
  return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + b"\0\0\0\0"


@pytest.mark.parametrize("tag", [(282, 5, 1), (270, 2, 400), (0x8769, 4, 1)])
def test_damage_elsewhere_leaves_the_orientation(tmp_path, tag):
  exif = ifd((274, 3, 1, b"\x06\0\0\0"), (*tag, b"\xff\xff\xff\x7f"))
  photo().save(tmp_path / "picture", format="JPEG", exif=exif)
  assert load_image(tmp_path / "picture").size == (48, 64)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_orientation_in_every_mode(tmp_path, mode):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  pixels = np.zeros((2, 3), np.uint16)
  pixels[0] = 65535
  picture = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray((pixels >> 8).astype(np.uint8)).convert(mode)
  picture.save(tmp_path / "picture", format="TIFF" if mode == "CMYK" else "PNG", exif=exif)
  loaded = np.asarray(load_image(tmp_path / "picture"))
  assert loaded.shape == (3, 2, 3)
  assert (loaded[:, 1] == 255).all() and (loaded[:, 0] == 0).all()


def test_digests_are_those_of_the_bytes_that_were_read(tmp_path):
  path, files = tmp_path / "a.png", PictureFiles(tmp_path)
  photo().save(path)
  image, digest = files.load("a.png")
  np.testing.assert_array_equal(image, photo())
  assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == files.digest("a.png")
  path.write_bytes(path.read_bytes() + b"x")
  assert files.load(str(path))[1] == files.digest("a.png") != digest
  for absent in ("b.png", str(tmp_path), f"{tmp_path}/a\0b"):
    assert files.digest(absent) is None
    for read in (files.load, files.size):
      with pytest.raises(ImageError):
        read(absent)


def test_the_size_is_that_of_the_loaded_picture(tmp_path):
  files = PictureFiles(tmp_path)
  for orientation, suffix in itertools.product(range(1, 9), ("jpg", "tif", "png", "webp")):
    exif, name = Image.Exif(), f"a.{suffix}"
    exif[ExifTags.Base.Orientation] = orientation
    photo().save(tmp_path / name, exif=exif)
    assert files.size(name) == files.load(name)[0].size == ((64, 48) if orientation < 5 else (48, 64)), name
  photo((101, 99)).save(tmp_path / "large.jpg")  # above the limit, so that it is decoded at half its size
  small = files.load("large.jpg", max_pixels=3000)[0].size
  assert files.size("large.jpg", max_pixels=3000) == small and small[0] < 60


def orientation(number):
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = number
  return exif.tobytes()


@pytest.mark.parametrize(
  ("before", "after", "is_turned"),
  [
    (b"", b"", False),
    (png_chunk(b"eXIf", orientation(6)[6:]), b"", True),
    (b"", png_chunk(b"eXIf", orientation(6)[6:]), True),
    (b"", png_chunk(b"eXIf", orientation(3)[6:]), False),
    (png_chunk(b"eXIf", orientation(6)[6:]), png_chunk(b"eXIf", orientation(1)[6:]), False),
    (b"", png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n1\n" + orientation(8).hex().encode()), True),
    (b"", png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="5"/>'), True),
    (b"", b"\0\0\0\1not" + png_chunk(b"eXIf", orientation(6)[6:]), False),
    (b"", png_chunk(b"eXIf", b"damaged"), False),
  ],
)
def test_the_size_of_a_png_is_known_without_decoding_it(tmp_path, before, after, is_turned):
  data = png(9, 5, 1, 0, bytes(15), before).replace(png_chunk(b"IEND", b""), after + png_chunk(b"IEND", b""))
  (tmp_path / "a.png").write_bytes(data)
  files = PictureFiles(tmp_path)
  assert files.load("a.png")[0].size == ((5, 9) if is_turned else (9, 5))
  with mock.patch.object(PngImagePlugin.PngImageFile, "load") as load:
    assert files.size("a.png") == ((5, 9) if is_turned else (9, 5))
  load.assert_not_called()


def test_metadata_after_the_first_frame_of_a_png(tmp_path):
  frames = [Image.new("RGB", (9, 5), colour) for colour in (RED, GREEN)]
  for default_image in (False, True):
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:], default_image=default_image)
    first, end, _ = (tmp_path / "a.png").read_bytes().rpartition(png_chunk(b"IEND", b""))
    start = first.index(b"fcTL", first.index(b"IDAT")) - 4
    exif = png_chunk(b"eXIf", orientation(6)[6:])
    for data in (first + exif + end, first[:start] + exif + first[start:] + end):
      (tmp_path / "a.png").write_bytes(data)
      assert PictureFiles(tmp_path).size("a.png") == PictureFiles(tmp_path).load("a.png")[0].size


@pytest.fixture(scope="module")
def huge_png(tmp_path_factory):
  """20,000 x 20,000 pixels of one bit."""
  path = tmp_path_factory.mktemp("huge") / "huge.png"
  path.write_bytes(png(20_000, 20_000, 1, 0, bytes(20_000 * 2501)))
  assert path.stat().st_size < 100_000
  return path


def test_huge_png_is_refused_before_decoding(huge_png):
  tracemalloc.start()
  assert_error(huge_png, "20000 x 20000 = 400,000,000 pixels", "178,956,970")
  assert tracemalloc.get_traced_memory()[1] < 2**20
  tracemalloc.stop()


def test_no_limit_of_pillow_shows(tmp_path):
  (tmp_path / "a.png").write_bytes(png(10_000, 9_000, 1, 0, bytes(9_000 * 1251)))
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert load_image(tmp_path / "a.png").size == (10_000, 9_000)
    assert_error(tmp_path / "a.png", "above the limit", max_pixels=89_999_999)
  assert not caught


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_limit_is_inclusive(tmp_path, format):
  photo().save(tmp_path / "picture", format=format)
  assert load_image(tmp_path / "picture", max_pixels=64 * 48).size == (64, 48)
  assert_error(tmp_path / "picture", "64 x 48", max_pixels=64 * 48 - 1)


@pytest.mark.parametrize(
  ("max_pixels", "size"),
  [(7575, (101, 75)), (7574, (51, 38)), (600, (26, 19)), (130, (13, 10))],
)
def test_jpeg_above_the_limit_is_decoded_smaller(tmp_path, max_pixels, size):
  x, y = np.meshgrid(np.arange(101), np.arange(75))
  ramp = np.stack([2 * x, 3 * y, 255 - 2 * x], axis=-1).astype(np.uint8)
  Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
  loaded = load_image(tmp_path / "a.jpg", max_pixels=max_pixels)
  assert loaded.size == size
  expected = Image.fromarray(ramp).resize(size, Image.Resampling.BOX)
  assert np.abs(np.asarray(loaded, int) - np.asarray(expected)).mean() < 8


def test_jpeg_too_large_at_any_scale_or_progressive(tmp_path):
  photo((101, 75)).save(tmp_path / "a.jpg")
  assert_error(tmp_path / "a.jpg", "101 x 75", max_pixels=129)
  photo((101, 75)).save(tmp_path / "b.jpg", progressive=True)
  assert load_image(tmp_path / "b.jpg").size == (101, 75)
  assert_error(tmp_path / "b.jpg", "101 x 75", max_pixels=600)


def test_threads(tmp_path):
  paths = []
  for number in range(12):
    path = tmp_path / f"{number}.png"
    Image.new("RGB", (50, 50), (number, 0, 0)).save(path)
    paths.append(path)
  limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    loaded = list(pool.map(load_image, paths * 8))
  assert [image.getpixel((9, 9))[0] for image in loaded] == [*range(12)] * 8
  assert Image.MAX_IMAGE_PIXELS == limit
  assert warnings.filters == filters
