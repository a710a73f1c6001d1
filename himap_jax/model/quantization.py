"""Which weights can be int8: those of the decoder's linear layers, and of a head of its own.

The tower, the connector, norms, and an embedding table, which may be the head as well, stay as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree


def can_be_int8(path: tuple[str, ...]) -> bool:
  """Whether the parameter at a path of the tree is such a weight."""
  is_linear = path[0] == "language_model" and path[-2].endswith("_proj") and path[-1] == "weight"
  return is_linear or path[0] == "lm_head"


def map_int8(convert: Callable[[Any], Any], params: PyTree) -> PyTree:
  """The tree with such weights converted."""

  def visit(path: tuple[jax.tree_util.DictKey, ...], leaf: Any) -> Any:
    return convert(leaf) if can_be_int8(tuple(entry.key for entry in path)) else leaf

  return jax.tree_util.tree_map_with_path(visit, params)
