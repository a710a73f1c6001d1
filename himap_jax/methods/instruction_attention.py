"""HiMAP's first criterion alone, at any number of stages: what the instruction attends to (Tables 4 and 9)."""

from himap_jax.method import Method
from himap_jax.methods import himap

METHOD = Method(
  source="arXiv 2503.13108, ablation",
  criteria=himap.METHOD.criteria[:1],
  prune_layers=himap.METHOD.prune_layers[:1],
  keep=himap.METHOD.keep[:1],
)
