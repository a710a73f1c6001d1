"""Weights as int8: symmetric, with a float32 scale for every output feature.

Axes: D in features, F out features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from checkpoints_convert.errors import CheckpointError


@jax.jit
def quantize(weight: Float[Array, "F D"]) -> Any:
  """A `qwix.QArray` of int8 values `[F, D]` and scales `[F, 1]`.

  Raises:
    CheckpointError: qwix is not installed.
  """
  return _qwix().quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))


def abstract_int8(weight: jax.ShapeDtypeStruct) -> Any:
  """What `quantize` makes of a weight of this shape, as `jax.ShapeDtypeStruct`s; it has shardings where the weight has one.

  Raises:
    CheckpointError: qwix is not installed.
  """
  sharding = scale_sharding = weight.sharding
  if sharding is not None:
    scale_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1], None))
  return _qwix().QArray(
    qvalue=jax.ShapeDtypeStruct(weight.shape, jnp.int8, sharding=sharding),
    scale=jax.ShapeDtypeStruct((weight.shape[0], 1), jnp.float32, sharding=scale_sharding),
    qtype=jnp.int8,
  )


def _qwix() -> Any:
  try:
    import qwix  # slow to import, and needed for int8 alone
  except ImportError as error:
    raise CheckpointError("int8 weights need qwix: pip install -e '.[int8]'") from error
  return qwix
