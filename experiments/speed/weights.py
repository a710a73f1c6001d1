"""Random weights that all sides of a comparison map from one file, so that a large model is in memory once."""

import contextlib
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator

import ml_dtypes
import numpy as np

BLOCK_BYTES = 64 << 20
ALIGNMENT = 64  # bytes; JAX on CPU uses an aligned NumPy array as it lies
# Bytes; far beyond any cache, so that reading weights that share them costs what reading others does.
LARGEST_FILE = 4 << 30


@contextlib.contextmanager
def random_file(directory: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
  """A file of random bfloat16 numbers of size 0.008 to 0.016 and either sign, for as long as this process holds it.

  It has no name of its own, so that nothing is left of it however the process ends.

  Raises:
    OSError: the directory has not enough room.
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
  """Hands out arrays from the file, one after the other, and from its start again where it ends."""

  def __init__(self, path: pathlib.Path):
    self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
    self._next = 0

  def take(self, shape: tuple[int, ...], name: str = "") -> np.ndarray:
    """A bfloat16 array that lies in the file; writing to it does not change the file.

    One with less than two axes is all ones, or zeros where its name ends in `bias`, and does not lie there.
    """
    if len(shape) < 2:
      return np.full(shape, not name.endswith("bias"), ml_dtypes.bfloat16)
    size = 2 * math.prod(shape)
    if self._next + size > len(self._bytes):
      self._next = 0
    start, self._next = self._next, self._next + -(-size // ALIGNMENT) * ALIGNMENT
    return self._bytes[start : start + size].view(ml_dtypes.bfloat16).reshape(shape)
