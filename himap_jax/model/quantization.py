"""Weights that can be int8: those of the decoder's linear layers and of an untied head.

The tower, the connector, norms and the embedding table, which may be a tied head, keep their dtype.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree


def can_be_int8(path: tuple[str, ...]) -> bool:
  """Whether the parameter at a tree path can be int8."""
  is_linear = path[0] == "language_model" and path[-2].endswith("_proj") and path[-1] == "weight"
  return is_linear or path[0] == "lm_head"


def map_int8(convert: Callable[[Any], Any], params: PyTree) -> PyTree:
  """Converts the weights that can be int8."""

  def visit(path: tuple[jax.tree_util.DictKey, ...], leaf: Any) -> Any:
    return convert(leaf) if can_be_int8(tuple(entry.key for entry in path)) else leaf

  return jax.tree_util.tree_map_with_path(visit, params)
