"""Model families, one module each: the meaning of `config.json`, and examples from prompts and pictures."""

import pathlib
from typing import Any

from checkpoints_convert.source import read_json
from himap_jax.errors import UserError
from himap_jax.families import llava
from himap_jax.families.family import Family
from himap_jax.model.config import ModelConfig

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llava.FAMILY,)}


def family_of(fields: dict[str, Any], *, where: str = "config.json") -> Family:
  """The family named in a `config.json`; raises `UserError` for a model type that is not supported."""
  model_type = fields.get("model_type")
  if model_type not in FAMILIES:
    known = ", ".join(map(repr, FAMILIES))
    raise UserError(f"{where}: model_type is {model_type!r}; supported: {known}")
  return FAMILIES[model_type]


def read_config(directory: str | pathlib.Path) -> ModelConfig:
  """Reads `config.json` of a checkpoint in the Hugging Face layout; absent fields take transformers' defaults.

  Raises:
    CheckpointError: `config.json` is missing or unreadable.
    UserError: the model is not supported.
  """
  path = pathlib.Path(directory) / "config.json"
  return from_hf(read_json(path), where=str(path))


def from_hf(fields: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
  """The configuration described by the fields of a `config.json`; errors as in `read_config`."""
  return family_of(fields, where=where).config(fields, where)
