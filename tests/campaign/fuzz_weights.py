"""Safetensors files and their indexes, damaged in their headers, their bytes and their lengths."""

import collections
import json
import pathlib
from typing import Any

import numpy as np
from campaign import bounded, mutations
from campaign.trials import Part, Trial
from hypothesis import strategies as st
from safetensors.numpy import save

from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.shards import read_headers

INPUTS = 100
INDEX = "model.safetensors.index.json"
TENSORS = [{"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float16)}, {"c": np.zeros((4, 1), np.float32)}]
NUMBER = st.sampled_from(mutations.HUGE) | st.integers(0, 64)
ENTRY = st.fixed_dictionaries(
  {
    "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "X"]) | mutations.VALUES,
    "shape": st.lists(NUMBER, max_size=3) | mutations.VALUES,
    "data_offsets": st.lists(NUMBER, min_size=2, max_size=2) | mutations.VALUES,
  }
)
HEADER = st.dictionaries(
  st.sampled_from(["a", "b", "__metadata__", ""]) | mutations.TEXTS, ENTRY | mutations.VALUES, max_size=3
)


def prepare(kept: pathlib.Path) -> Trial:
  return bounded.trial(_attempts, INPUTS, kept)


def _attempts(random: np.random.Generator, directory: pathlib.Path, count: int) -> collections.Counter[str]:
  valid = {f"model-{number}.safetensors": save(tensors) for number, tensors in enumerate(TENSORS)}
  where = {name: f"model-{number}.safetensors" for number, tensors in enumerate(TENSORS) for name in tensors}
  valid[INDEX] = json.dumps({"metadata": {}, "weight_map": where}).encode()

  def damaged(number: int) -> str:
    del number
    chosen = str(random.choice(list(valid)))
    return _read(directory, valid | {chosen: mutations.mutated(random, valid[chosen], b"".join(valid.values()))})

  def headed(header: tuple[dict, int]) -> str:
    fields, missing = header
    text = json.dumps(fields).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(64 - missing)
    return _read(
      directory, {name: content for name, content in valid.items() if name != INDEX} | {"model.safetensors": data}
    )

  found: collections.Counter[str] = bounded.each(range(count // 2), damaged)
  found.update(mutations.structured(random, count - count // 2, st.tuples(HEADER, st.integers(0, 64)), headed))
  return found


def _read(directory: pathlib.Path, files: dict[str, bytes]) -> str:
  for path in directory.iterdir():
    path.unlink()
  for name, content in files.items():
    (directory / name).write_bytes(content)
  try:
    stored = read_headers(directory)
    arrays: dict[str, Any] = {
      name: tensor.reader()(...) for name, tensor in stored.items() if tensor.dtype in ("F32", "F16")
    }
  except CheckpointError as error:
    assert "\n" not in str(error), error
    return "refused"
  assert all(array.shape == stored[name].shape for name, array in arrays.items())
  return "read"


PART = Part("Damaged safetensors and indexes are read or refused in one line.", prepare, INPUTS)
