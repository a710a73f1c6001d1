"""Repeated layers are traced once for each program."""

import flax.linen as nn


def traced_once(layer: type[nn.Module], *methods: str) -> type[nn.Module]:
  """A class whose instances of the same configuration share one trace of a method at equal shapes.

  Call it where the layers are made, so that a trace belongs to one program: it depends on contexts that flax does not
  know of, such as interceptors of methods.

  Args:
    layer: the class of the repeated layers.
    methods: those that are called from outside; `__call__` by default.
  """
  return nn.jit(layer, methods=methods or None)
