"""The settings that lmms-eval's `--model_args` give, which separates them by commas and lists by colons."""

import dataclasses
from typing import Any

from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import flag_values

LISTS = {"prune_layers": int, "keep": flag_values.keep_count, "prompt_buckets": int}


@dataclasses.dataclass(frozen=True)
class Settings:
  """As the flags of `himap_jax.run` of the same names.

  Attributes:
    max_new_tokens: of answers, where a task gives no number.
  """

  checkpoint: str = "demo"
  method: str = "none"
  prune_layers: tuple[int, ...] | None = None
  keep: tuple[int | float, ...] | None = None
  restore: bool = False
  keep_positions: bool = False
  dtype: str = "bfloat16"
  batch_size: int = 1
  max_new_tokens: int = 128
  prompt_template: str = "chat"
  prompt_buckets: tuple[int, ...] = ()
  max_image_tokens: int | None = None
  image_aspect_ratio: str = "checkpoint"
  seed: int = 0

  @classmethod
  def of(cls, given: dict[str, Any]) -> "Settings":
    """Reads the values, which may be text; raises `UserError` at an unknown name or a value that cannot be read."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in given.items():
      if name not in fields:
        raise UserError(f"--model_args: unknown {name}; known: {', '.join(fields)}")
      try:
        values[name] = _read(name, value, fields[name].default)
      except ValueError as error:
        raise UserError(f"--model_args: {name}={value} cannot be read") from error
    settings = cls(**values)
    for name, known in (("dtype", checkpoint.DTYPES), ("image_aspect_ratio", checkpoint.ASPECT_RATIOS)):
      if getattr(settings, name) not in known:
        raise UserError(f"--model_args: {name}={getattr(settings, name)}; known: {', '.join(known)}")
    methods.parse(settings.method)
    return settings

  @property
  def pruning(self) -> PruningConfig:
    options = dict(restore=self.restore, keep_positions=self.keep_positions)
    return PruningConfig(self.method, self.prune_layers, self.keep, **options)


def _read(name: str, value: Any, default: Any) -> Any:
  if name in LISTS:
    return tuple(map(LISTS[name], str(value).split(":")))
  if isinstance(default, bool):
    return bool(["false", "true"].index(str(value).lower()))
  if isinstance(default, int) or name == "max_image_tokens":
    return int(value)
  return str(value)
