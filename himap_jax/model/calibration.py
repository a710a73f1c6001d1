"""RESTORE's calibration of attention after image tokens were removed (arXiv 2606.01711).

The logit z_mn of query m and of the key n of an image token that is left becomes

    z_mn + log s_n + log(2 − D(m, n)),   D(m, n) = (2/H) Σ_j cos(θ_j (m − n)),

where θ_j are the H/2 rotary frequencies: a rotary embedding lowers attention to distant keys, and where many were near
each other few are left. In the first layer after a removal s_n is the row's image tokens before it over those after it;
in other layers it is 1. With several axes of positions each frequency turns by its own axis, and features that are not
rotated have the frequency 0.

Axes: B batch, S slots, Q queries, F rotated features of a head, H head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from himap_jax.inputs import Calibration, take_slots

CONSTANT = 2


def gain(
  rotation: tuple[Float[Array, "B S 1 F"], Float[Array, "B S 1 F"]],
  calibration: Calibration,
  head_dim: int,
  slots: Int[Array, "B Q"] | None = None,
  *,
  is_first: bool,
) -> Float[Array, "B Q S"]:
  """What logits of queries in `slots`, or in all slots, gain in a layer, in float32.

  Args:
    is_first: whether the layer is the first after the last removal.
  """
  turned = jnp.concatenate(rotation, axis=-1)[:, :, 0]
  queries = turned if slots is None else take_slots(turned, slots)
  # the product of two rotations is cos(a)cos(b) + sin(a)sin(b) = cos(a − b), of which every frequency has two
  rotated = jnp.einsum("BQF,BSF->BQS", queries, turned, precision="highest")
  closeness = (rotated + head_dim - rotation[0].shape[-1]) / head_dim
  by_distance = jnp.where(calibration.is_left[:, None], jnp.log(CONSTANT - closeness), 0)
  return by_distance + calibration.log_count[:, None] if is_first else by_distance
