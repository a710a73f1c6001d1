"""Buckets of image tokens, and batches whose rows have different numbers of them."""

import collections
import itertools

import numpy as np
import pytest

from himap_jax.engine import batching
from himap_jax.engine.batching import Batcher, Bucket, ImageBucket, image_buckets
from himap_jax.errors import UserError
from himap_jax.families.examples import blank
from himap_jax.inputs import IMAGE, Example, Images, ImageSize


def realistic_sizes(num_rows=2000):
  """Tiles and image tokens of rows with pictures of many sizes, as dynamic resolution makes them."""
  rng = np.random.default_rng(0)
  tokens = np.clip(rng.lognormal(6.7, 0.6, num_rows), 64, 4096).astype(int)
  return collections.Counter(ImageSize(int(count), int(count)) for count in tokens)


def sizes_of_tiles(num_rows=2000):
  """Rows of up to four pictures, each of two to ten tiles whose tokens are cut and limited as LLaVA-OneVision's."""
  rng = np.random.default_rng(1)
  sizes = collections.Counter()
  for _ in range(num_rows):
    pictures = int(rng.choice([1, 1, 1, 1, 2, 3, 4]))
    tiles = rng.integers(1, 10, pictures)
    tokens = [729 + min(int(count * 729 * rng.uniform(0.6, 1)), 6561) for count in tiles]
    sizes[ImageSize(int(tiles.sum()) + pictures, sum(tokens))] += 1
  return sizes


def waste(buckets, sizes):
  """Shares of the tiles and of the image tokens that are padding."""

  def of(size):
    return next(b for b in buckets if Bucket(b.num_tiles, b.num_image_tokens, 64, b.is_ragged).holds(size))

  used, slots = np.zeros(2), np.zeros(2)
  for size, count in sizes.items():
    used += count * np.array(size)
    slots += count * np.array([of(size).num_tiles, of(size).num_image_tokens])
  return 1 - used / slots


@pytest.mark.parametrize("sizes", [realistic_sizes(), sizes_of_tiles()], ids=["patches", "tiles"])
def test_few_buckets_waste_little(sizes):
  buckets = image_buckets(sizes)
  tiles, tokens = waste(buckets, sizes)
  assert len(buckets) <= batching.MAX_IMAGE_BUCKETS and tokens < 0.1 and tiles < 0.17, (len(buckets), tiles, tokens)
  assert max(size.num_tokens for size in sizes) == buckets[-1].num_image_tokens


def test_equal_pictures_have_buckets_without_padding():
  assert image_buckets({ImageSize(1, 576): 9}) == (ImageBucket(1, 576),)
  sizes = {ImageSize(1, 256): 5, ImageSize(2, 512): 1, ImageSize(0, 0): 3}
  assert image_buckets(sizes) == (ImageBucket(0, 0), ImageBucket(1, 256), ImageBucket(2, 512))
  assert image_buckets({ImageSize(0, 0): 1}) == (ImageBucket(0, 0),)


def test_similar_pictures_share_one():
  sizes = {ImageSize(3, 1000): 50, ImageSize(4, 990): 50, ImageSize(5, 2000): 50}
  assert image_buckets(sizes) == (ImageBucket(4, 1000, True), ImageBucket(5, 2000))
  exact = image_buckets(sizes, exact=True)
  assert exact == (ImageBucket(4, 990), ImageBucket(3, 1000), ImageBucket(5, 2000))


def test_the_best_split_is_found():
  """Against every split into three groups."""
  rng = np.random.default_rng(1)
  tokens, counts = rng.permutation(400)[:9] + 1, rng.integers(1, 9, 9)
  sizes = {ImageSize(1, int(n)): int(count) for n, count in zip(tokens, counts, strict=True)}
  ordered = sorted(sizes)

  def slots(groups):
    return sum(group[-1].num_tokens * sum(sizes[size] for size in group) for group in groups)

  *_, groups = batching._best_groups(ordered, sizes, 3)
  assert list(itertools.chain(*groups)) == ordered
  splits = [(i, j) for i in range(1, 8) for j in range(i + 1, 9)]
  assert slots(groups) == min(slots([ordered[:i], ordered[i:j], ordered[j:]]) for i, j in splits)


def example(tiles, tokens, text=3):
  image_id = np.append(np.zeros(tokens, np.int32), -np.ones(text, np.int32)).astype(np.int32)
  slots = np.arange(len(image_id), dtype=np.int32)
  images = Images(
    np.full((tiles, 5), tiles, np.float32),
    np.ones((tiles, 3), np.int32),
    np.ones((tokens, 2), np.int32),
    np.full((tokens, 2), 0.5, np.float32),
  )
  return Example(slots, image_id, np.stack([slots] * 3, axis=1), images)


@pytest.fixture
def batcher():
  empty = example(0, 0)
  sizes = [ImageBucket(0, 0), ImageBucket(4, 10, True), ImageBucket(6, 20)]
  return Batcher(64, blank(empty.images, 3), sizes, buckets=(8, 16), max_new_tokens=4)


def test_what_a_ragged_batch_holds(batcher):
  rows = [example(4, 8), example(2, 10, text=5), example(1, 1)]
  assert {batcher.bucket(row) for row in rows} == {Bucket(4, 10, 8, True)}
  batch = batcher.pack(rows, bucket=Bucket(4, 10, 8, True), batch_size=4)
  assert batch.layout.is_ragged and batch.layout.num_image_tokens == 10
  assert (batch.layout.kind == IMAGE).sum(axis=1).tolist() == [8, 10, 1, 1]
  assert batch.tokens.shape == (4, 18) and batch.positions.shape == (4, 18, 3)
  images = batch.images
  assert images.pixels.shape == (4, 4, 5) and images.coordinates.shape == (4, 4, 3)
  assert images.pack_index.shape == images.pack_weight.shape == (4, 10, 2)
  assert images.coordinates[1].tolist() == [[1] * 3] * 2 + [[-1] * 3] * 2
  assert images.pixels[2].tolist() == [[1] * 5] + [[0] * 5] * 3


def test_rows_without_pictures_and_no_rows(batcher):
  assert batcher.bucket(example(0, 0)) == Bucket(0, 0, 8)
  batch = batcher.pack([example(0, 0)], bucket=Bucket(0, 0, 8), batch_size=2)
  assert batch.images.pixels.shape == (2, 0, 5) and batch.layout.num_image_tokens == 0
  empty = batcher.pack([], bucket=Bucket(6, 20, 16), batch_size=2)
  assert empty.images.pixels.shape == (2, 6, 5) and empty.positions.shape == (2, 36, 3)


def test_pictures_of_a_size_that_no_bucket_has(batcher):
  assert batcher.bucket(example(6, 20)) == Bucket(6, 20, 8)
  with pytest.raises(UserError, match="another size than when the run started .19 image tokens"):
    batcher.bucket(example(6, 19))
  with pytest.raises(
    UserError, match="has 51 text tokens; with 10 image tokens the model's context leaves room for 50"
  ):
    batcher.bucket(example(4, 10, text=51))


def test_a_row_s_room_for_text_does_not_depend_on_the_rows_beside_it(batcher):
  assert batcher.bucket(example(1, 2, text=58)) == Bucket(4, 10, 59, True)
  with pytest.raises(UserError, match="has 59 text tokens; with 2 image tokens the model's context leaves room for 58"):
    batcher.bucket(example(1, 2, text=59))
