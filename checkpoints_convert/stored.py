"""A tensor in a weight file, whatever the file's format."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

FLOAT_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}

# A part of an array: a slice for each axis.
Index = tuple[slice, ...]

# Reads the part of a tensor that an index names, or the whole tensor for `...`, into memory of its own.
Reader = Callable[[Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """Location, dtype (by its safetensors name, such as `BF16`) and shape of a stored tensor.

  Attributes:
    open: opens the tensor that has a name in a file of this format.
  """

  name: str
  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  open: Callable[[pathlib.Path, str], Reader]

  @property
  def num_bytes(self) -> int:
    """Size in bytes, for dtypes in `FLOAT_DTYPES`."""
    return FLOAT_DTYPES[self.dtype].itemsize * math.prod(self.shape)

  def reader(self) -> Reader:
    """Opens the tensor; nothing is read before the reader is called."""
    return self.open(self.path, self.name)
