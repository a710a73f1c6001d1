"""Model families, one module each: the meaning of `config.json`, and examples from prompts and pictures."""

from typing import Any

from himap_jax.errors import UserError
from himap_jax.families import (
  gemma3,
  idefics3,
  internvl,
  llava,
  llava_cross,
  llava_next,
  llava_onevision,
  mllama,
  qwen2_vl,
  qwen_vl,
)
from himap_jax.families.family import Family
from himap_jax.families.fields import check_fields, check_sizes
from himap_jax.model.config import ModelConfig

_ALL = (llava, llava_cross, llava_next, llava_onevision, internvl, idefics3, gemma3, mllama, qwen_vl, qwen2_vl)
FAMILIES: dict[str, Family] = {family.model_type: family for module in _ALL for family in module.FAMILIES}


def family_of(fields: dict[str, Any], *, where: str = "config.json") -> Family:
  """The family named in a `config.json`; raises `UserError` for another model type, or fields that no model has."""
  check_fields(fields, where)
  model_type = fields.get("model_type")
  if model_type not in FAMILIES:
    known = ", ".join(map(repr, FAMILIES))
    raise UserError(f"{where}: model_type is {model_type!r}; supported: {known}")
  return FAMILIES[model_type]


def from_hf(fields: dict[str, Any], *, where: str = "config.json") -> ModelConfig:
  """The sizes described by the fields of a `config.json`, where absent ones have transformers' defaults.

  Raises:
    UserError: the model is not supported, or a field has no sensible value.
  """
  config = family_of(fields, where=where).config(fields, where)
  check_sizes(config, where)
  return config
