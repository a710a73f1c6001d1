"""Model families: what `config.json` means, and how a prompt and its picture become an example. A family is one module."""

import pathlib
from typing import Any

from checkpoints_convert.source import read_json
from himap_jax.errors import UserError
from himap_jax.families import llava
from himap_jax.families.family import Family
from himap_jax.model.config import ModelConfig

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llava.FAMILY,)}


def family_of(fields: dict[str, Any], *, where: str = "config.json") -> Family:
  """The family that the fields of a `config.json` name.

  Raises:
    UserError: a model type that the library does not run; the message names those it does.
  """
  model_type = fields.get("model_type")
  if model_type not in FAMILIES:
    known = ", ".join(map(repr, FAMILIES))
    raise UserError(f"{where}: model_type is {model_type!r}; this library runs {known}")
  return FAMILIES[model_type]


def read_config(directory: str | pathlib.Path) -> ModelConfig:
  """Reads `config.json` of a checkpoint in the Hugging Face layout; absent fields have transformers' defaults.

  Raises:
    CheckpointError: there is no readable `config.json`.
    UserError: it describes a model that the library does not run.
  """
  path = pathlib.Path(directory) / "config.json"
  return from_hf(read_json(path), where=str(path))


def from_hf(fields: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
  """The configuration that the fields of a `config.json` describe; errors as in `read_config`."""
  return family_of(fields, where=where).config(fields, where)
