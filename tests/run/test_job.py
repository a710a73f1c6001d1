"""What a run prints of its shapes."""

import numpy as np
import pytest

from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.families.examples import blank
from himap_jax.inputs import Images
from himap_jax.run import job


@pytest.mark.parametrize(
  ("buckets", "expected"),
  [
    ([ImageBucket(0, 0), ImageBucket(1, 64), ImageBucket(3, 192, True)], "0, 64, up to 192"),
    (
      [ImageBucket(0, 0), *(ImageBucket(tiles, count) for count in range(10, 20) for tiles in (1, 2))],
      "from 10 to 19 in 21 shapes, each with programs of its own, since the method pads none",
    ),
  ],
)
def test_shapes_are_listed_or_counted(buckets, expected):
  batcher = Batcher(512, blank(Images(np.zeros((0, 3, 8, 8), np.float32))), buckets, buckets=(64, 128))
  assert job.describe_buckets(batcher) == expected
