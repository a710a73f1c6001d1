"""Encodes each picture once for all cells of a comparison."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from himap_jax.engine.engine import Batch, Engine
from himap_jax.engine.pool import Answered
from himap_jax.inputs import Images, Inputs
from himap_jax.model.network import EncodedImages, Model


class Encodings:
  """What the tower and the connector make of pictures; kept on the host for the first ones that fit into memory."""

  def __init__(self, model: Model, max_bytes: int):
    """`max_bytes` is the memory for encodings; further pictures are encoded whenever they are asked for."""
    self._model, self._left = model, max_bytes
    self._encode = jax.jit(lambda model, images: model.bind().encode_images(images))
    self._kept: dict[bytes, EncodedImages] = {}

  def __call__(self, inputs: Inputs) -> Inputs:
    """The inputs with encoded pictures."""
    rows = range(len(inputs.tokens))
    encoded = [self._row(jax.tree.map(lambda x, row=row: x[row : row + 1], inputs.images)) for row in rows]
    return inputs.replace(images=jax.tree.map(lambda *own: np.concatenate(own), *encoded))

  def _row(self, images: Images) -> EncodedImages:
    digest = hashlib.blake2b()
    for leaf in jax.tree.leaves(images):
      digest.update(np.ascontiguousarray(leaf))
    key = digest.digest()
    if key in self._kept:
      return self._kept[key]
    encoded = jax.device_get(self._encode(self._model, images))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(encoded))
    if num_bytes <= self._left:
      self._kept[key] = encoded
      self._left -= num_bytes
    return encoded


class EncodingEngine(Engine):
  """An engine that takes the encodings of pictures from others' work."""

  def __init__(self, encodings: Encodings, *args: Any, **options: Any):
    super().__init__(*args, **options)
    self._encodings = encodings

  def prefill_rows(self, row: Inputs) -> int:
    return super().prefill_rows(self._encodings(row))

  def answer(self, batches: Iterable[Batch]) -> Iterator[list[Answered]]:
    return super().answer(batch._replace(inputs=self._encodings(batch.inputs)) for batch in batches)
