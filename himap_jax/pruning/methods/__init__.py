"""The pruning methods; every module here lists its own in `METHODS`."""

import importlib
import pkgutil

from himap_jax.errors import UserError
from himap_jax.pruning.method import Method

_MODULES = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
METHODS: dict[str, Method] = dict(sorted(item for module in _MODULES for item in module.METHODS.items()))
if len(METHODS) < sum(len(module.METHODS) for module in _MODULES):
  raise RuntimeError("two modules of himap_jax.pruning.methods name the same method")


def parse(method: str) -> list[str]:
  """The method names in `a` or `a+b`; raises `UserError` for an unknown one."""
  names = method.split("+")
  for name in names:
    if name not in METHODS:
      raise UserError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
  return names
