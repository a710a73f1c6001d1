"""The flags that choose a pruning method, and the same as one text that can be shared."""

import re

from absl import flags

from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.pruning.config import PruningConfig
from himap_jax.run import flag_values

NAMES = ("method", "prune_layers", "keep", "method_parameters", "restore", "keep_positions")
SWITCHES = ("restore", "keep_positions")


def define(values: flags.FlagValues) -> None:
  """Defines the flags in `NAMES`."""
  flags.DEFINE_string(
    "method",
    "himap",
    f"The pruning method: {', '.join(methods.METHODS)}; or one before the decoder + one inside, such as "
    "divprune+himap.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "prune_layers",
    None,
    "Layers to prune before, such as 2,8; 0 is before the decoder. The method's own by default.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "keep",
    None,
    "Image tokens to keep at each stage, such as 288,72, or shares of a row's own, such as 50%,12.5%. The method's own "
    "by default.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "method_parameters",
    None,
    "Parameters of the method, such as threshold:0.8. The method's own by default.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "restore",
    False,
    "Raise the attention to the image tokens that are left, and keep their positions, to make up for those that were "
    "removed (RESTORE). An option of every method that removes some.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "keep_positions",
    False,
    "Let image tokens that are left before the decoder keep their positions, in place of new ones without gaps.",
    flag_values=values,
  )


def config(values: flags.FlagValues) -> PruningConfig:
  """What the flags choose; raises `UserError` if one is malformed or the method unknown."""
  methods.parse(values["method"].value)
  return PruningConfig(
    values["method"].value,
    flag_values.numbers(values["prune_layers"], int),
    flag_values.numbers(values["keep"], flag_values.keep_count),
    flag_values.numbers(values["method_parameters"], flag_values.named_number, "such as threshold:0.8") or (),
    *(values[name].value for name in SWITCHES),
  )


def parse(text: str) -> PruningConfig:
  """What flags in a text choose, such as `--method=himap --keep=288,72`; it can name no others, and no files.

  Raises:
    UserError: another flag, or as in `config`.
  """
  parts = text.split()
  for part in parts:
    if part not in {f"--{name}" for name in SWITCHES} and not re.fullmatch(rf"--({'|'.join(NAMES)})=.+", part):
      raise UserError(f"{part[:100]!r} is none of {', '.join(f'--{name}=' for name in NAMES)}")
  values = flags.FlagValues()
  define(values)
  try:
    values(["", *parts])
  except flags.Error as error:
    raise UserError(str(error)) from error
  return config(values)


def text(pruning: PruningConfig) -> str:
  """The flags that choose it, as `parse` reads them; shares have ten digits."""
  keep = [count if isinstance(count, int) else f"{100 * count:.10g}%" for count in pruning.keep or ()]
  parameters = [f"{name}:{value:.12g}" for name, value in pruning.parameters]
  lists = {"prune_layers": pruning.prune_layers, "keep": keep, "method_parameters": parameters}
  given = [f"--{name}={','.join(map(str, values))}" for name, values in lists.items() if values]
  switches = [f"--{name}" for name in SWITCHES if getattr(pruning, name)]
  return " ".join([f"--method={pruning.method}", *given, *switches])
