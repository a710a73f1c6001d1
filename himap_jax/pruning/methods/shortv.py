"""ShortV: all image tokens are kept, but layers that change them little do not update them."""

from himap_jax.errors import UserError
from himap_jax.pruning.method import SEQUENCE, Method

# The authors' layers for LLaVA-1.5-7B (32 layers) and -13B (40 layers), least useful first.
FROZEN = {
  32: (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
  40: (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
}


def frozen_layers(num_layers: int) -> tuple[int, ...]:
  """The authors' table; raises `UserError` for a decoder of another depth."""
  if num_layers not in FROZEN:
    raise UserError(
      f"method 'shortv' has tables for decoders of {' and '.join(map(str, FROZEN))} layers, and this one has "
      f"{num_layers}; name the layers to freeze with prune_layers"
    )
  return FROZEN[num_layers]


METHODS = {"shortv": Method("arXiv 2504.00502", prune_layers=frozen_layers, freezes=True, needs=SEQUENCE)}
