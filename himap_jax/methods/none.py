"""No pruning: the control that everything is compared with."""

from himap_jax.method import Method

METHOD = Method("no pruning")
