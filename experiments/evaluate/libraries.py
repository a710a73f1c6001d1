"""Libraries that only an evaluation needs, imported where they are used."""

import importlib
import types

from himap_jax.errors import UserError

EXTRA = "pip install 'himap_jax[eval]'"


def library(name: str, purpose: str) -> types.ModuleType:
  """Imports a module; raises `UserError` that names the extra if it is not installed."""
  try:
    return importlib.import_module(name)
  except ImportError as error:
    package = name.partition(".")[0]
    raise UserError(f"{purpose} needs {package}, in the extra `eval`: {EXTRA}") from error
