"""Int8 weights: symmetric, with a float32 scale for every output feature.

Axes: D in features, F out features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from checkpoints_convert.errors import CheckpointError


def quantize(weight: Float[Array, "F D"]) -> Any:
  """A `qwix.QArray` with int8 values `[F, D]` and scales `[F, 1]`; raises `CheckpointError` without qwix."""
  _require_qwix()
  return _quantize(weight)


def quantize_and_delete(weight: Float[Array, "F D"]) -> Any:
  """As `quantize`, and deletes the weight, so that at most one such array exists at a time."""
  result = jax.block_until_ready(quantize(weight))
  weight.delete()
  return result


def _require_qwix() -> None:
  try:
    import qwix  # noqa: F401  slow to import, needed only for int8
  except ImportError as error:
    raise CheckpointError("int8 weights need qwix: pip install -e '.[int8]'") from error


@jax.jit
def _quantize(weight: Float[Array, "F D"]) -> Any:
  import qwix

  return qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))


def abstract_int8(weight: jax.ShapeDtypeStruct) -> Any:
  """The result of `quantize` as `jax.ShapeDtypeStruct`s, with shardings where the weight has one."""
  _require_qwix()  # not where JAX remembers that it traced
  int8, sharding = jax.eval_shape(_quantize, weight), weight.sharding
  if sharding is None:
    return int8
  scales = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1], None))
  return jax.tree.map(lambda x: x.update(sharding=sharding if x.shape == weight.shape else scales), int8)
