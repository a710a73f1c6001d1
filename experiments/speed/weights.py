"""Random weights that all sides map from one file, so that a large model is in memory only once."""

import contextlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator

import ml_dtypes
import numpy as np

BLOCK_BYTES = 64 << 20
ALIGNMENT = 64  # bytes; JAX on CPU uses an aligned NumPy array without copying
# Bytes; far beyond any cache, so that weights that share memory take as long to read as separate ones.
LARGEST_FILE = 4 << 30


@contextlib.contextmanager
def random_file(directory: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
  """Yields a file of random bfloat16 numbers of either sign and magnitude 0.008 to 0.016; `OSError` without space.

  The file has no name, so that nothing is left of it however the process ends.
  """
  numbers = np.random.default_rng(0).integers(0, 1 << 16, BLOCK_BYTES // 2, np.uint16)
  block = ((numbers & 0x807F) | (120 << 7)).tobytes()  # sign and mantissa at random, the exponent of 2 ** -7
  num_bytes = min(num_bytes, LARGEST_FILE)
  with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
    os.posix_fallocate(file.fileno(), 0, num_bytes)
    for start in range(0, num_bytes, BLOCK_BYTES):
      file.write(memoryview(block)[: num_bytes - start])
    yield pathlib.Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


class Weights:
  """Hands out consecutive arrays from the file, and starts again at its end."""

  def __init__(self, path: pathlib.Path):
    self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
    self._next = 0

  def take(self, shape: tuple[int, ...], name: str = "") -> np.ndarray:
    """A bfloat16 array mapped from the file; writing to it does not change the file.

    An array with fewer than two axes is not mapped: it is all ones, or zeros if its name ends in `bias`.
    """
    if len(shape) < 2:
      return np.full(shape, not name.endswith("bias"), ml_dtypes.bfloat16)
    size = 2 * math.prod(shape)
    if self._next + size > len(self._bytes):
      self._next = 0
    start, self._next = self._next, self._next + -(-size // ALIGNMENT) * ALIGNMENT
    return self._bytes[start : start + size].view(ml_dtypes.bfloat16).reshape(shape)
