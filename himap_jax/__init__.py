"""Multimodal LLMs with visual-token pruning in JAX; names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from himap_jax.checkpoint import LoadedModel as LoadedModel
  from himap_jax.checkpoint import load as load
  from himap_jax.engine.engine import GenerationConfig as GenerationConfig
  from himap_jax.engine.sampling import Sampling as Sampling
  from himap_jax.errors import UserError as UserError
  from himap_jax.generation import Answer as Answer
  from himap_jax.generation import InputConfig as InputConfig
  from himap_jax.generation import generate as generate
  from himap_jax.pruning.config import PruningConfig as PruningConfig
  from himap_jax.pruning.config import build_schedule as build_schedule
  from himap_jax.pruning.schedule import Schedule as Schedule
  from himap_jax.pruning.schedule import Stage as Stage

_NAMES = {
  "checkpoint": ("LoadedModel", "load"),
  "engine.engine": ("GenerationConfig",),
  "engine.sampling": ("Sampling",),
  "errors": ("UserError",),
  "generation": ("Answer", "InputConfig", "generate"),
  "pruning.config": ("PruningConfig", "build_schedule"),
  "pruning.schedule": ("Schedule", "Stage"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
  if name not in _MODULE_OF:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
