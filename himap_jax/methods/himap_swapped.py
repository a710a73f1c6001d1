"""HiMAP with its criteria exchanged: what the image attends to first, then what the instruction attends to (Table 4)."""

from himap_jax.method import Method
from himap_jax.methods import himap

METHOD = Method(
  source="arXiv 2503.13108, ablation",
  criteria=himap.METHOD.criteria[::-1],
  prune_layers=himap.METHOD.prune_layers,
  keep=himap.METHOD.keep,
)
