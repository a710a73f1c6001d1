"""Parameters made of stored tensors, such as parts of fused ones: transforms of `names.Entry`.

Axes: F rows (out features), D in features.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PROJECTIONS = ("q_proj", "k_proj", "v_proj")

# Makes a parameter from a stored tensor and the fields of config.json.
Transform = Callable[[np.ndarray, Mapping[str, Any]], np.ndarray]


class UnfitShape(ValueError):
  """Raised by a transform whose tensor does not have the shape that config.json implies: `expected`."""

  def __init__(self, expected: tuple[int, ...]):
    super().__init__(f"expected {list(expected)}")
    self.expected = expected


def split_rows(tensor: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
  """Splits a weight `[F, D]` or a bias `[F]` into parts with these numbers of rows; raises `UnfitShape`."""
  if tensor.shape[:1] != (sum(sizes),):
    raise UnfitShape((sum(sizes), *tensor.shape[1:]))
  return np.split(tensor, np.cumsum(sizes)[:-1])


def qkv(part: int) -> Transform:
  """One of the projections to queries (0), keys (1) and values (2), whose rows are stored in this order."""

  def transform(tensor: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    text = fields["text_config"]
    num_heads = text["num_attention_heads"]
    num_keys = text.get("num_key_value_heads") or num_heads
    head_dim = text.get("head_dim") or text["hidden_size"] // num_heads
    return split_rows(tensor, [num_heads * head_dim, num_keys * head_dim, num_keys * head_dim])[part]

  return transform


def gate_up(part: int) -> Transform:
  """The gate (0) or the other (1) projection of a gated feed-forward, whose rows are stored in this order."""

  def transform(tensor: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    return split_rows(tensor, [fields["text_config"]["intermediate_size"]] * 2)[part]

  return transform


def thirds(*width: str) -> Callable[[int], Transform]:
  """`qkv` for parts of the same number of rows, which config.json gives under the names `width`."""

  def of_part(part: int) -> Transform:
    def transform(tensor: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
      return split_rows(tensor, [functools.reduce(lambda own, name: own[name], width, fields)] * 3)[part]

    return transform

  return of_part


def qkv_of_heads(part: int) -> Transform:
  """As `qkv` for Qwen-VL's tower, which stores a query, a key and a value of each head in turn."""

  def transform(tensor: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
    visual = fields["visual"]
    (rows,) = split_rows(tensor, [3 * visual["width"]])
    by_head = rows.reshape(visual["heads"], 3, -1, *tensor.shape[1:])
    return by_head[:, part].reshape(-1, *tensor.shape[1:])

  return transform


def transposed(tensor: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
  """A matrix that is stored with in features first."""
  del fields
  return tensor.T


def of_stills(tensor: np.ndarray, fields: Mapping[str, Any]) -> np.ndarray:
  """A convolution's weight `[F, 3, frames, height, width]` for equal frames: their sum, in the stored dtype."""
  del fields
  if tensor.ndim != 5:
    raise UnfitShape((*tensor.shape[:2], 2, *tensor.shape[-2:]))
  frames = np.moveaxis(tensor, 2, 0)
  return sum(frame.astype(np.float32) for frame in frames).astype(tensor.dtype)
