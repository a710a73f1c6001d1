"""What a model lets one choose: its methods, with the layers and keep counts that they start from."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from himap_jax.errors import UserError
from himap_jax.pruning import methods
from himap_jax.pruning.methods import METHODS, PruningConfig
from himap_jax.pruning.schedule import Schedule, Stage
from himap_jax.run.asking import Asker


def choices(asker: Asker) -> dict[str, Any]:
  """Every method that the model can run, alone or after one before the decoder; as JSON for the page.

  Keep counts are image tokens if all pictures have equally many, else percent of a picture's. The configured method
  starts from the configured layers and counts.

  Raises:
    UserError: the configuration keeps counts where percent are needed.
  """
  count = asker.processor.num_image_tokens
  found = {name: _describe(name, schedule, count) for name, schedule in _schedules(asker)}
  return {
    "num_layers": asker.opened.config.text.num_hidden_layers,
    "num_image_tokens": count,
    "methods": found,
  }


def _schedules(asker: Asker) -> Iterator[tuple[str, Schedule]]:
  configured = asker.config.pruning
  pairs = (f"{first}+{second}" for first, second in itertools.permutations(METHODS, 2))
  for name in (*METHODS, *pairs):
    pruning = configured if name == configured.method else PruningConfig(name)
    with contextlib.suppress(UserError):
      yield name, asker.schedule(pruning)


def _describe(name: str, schedule: Schedule, num_image_tokens: int | None) -> dict[str, Any]:
  """The method's defaults; `repeats` if its last criterion serves any number of stages inside the decoder."""
  entries = [METHODS[own] for own in methods.parse(name)]
  last = entries[-1]

  def keep(stage: Stage) -> int | float:
    if num_image_tokens is not None:
      return stage.count(num_image_tokens)
    if isinstance(stage.keep, int):
      raise UserError(f"--keep={stage.keep}: pictures of this model differ in image tokens; keep a share, such as 25%")
    return round(100 * stage.keep, 1)

  return {
    "source": "; ".join(entry.source for entry in entries),
    "layers": [stage.layer for stage in schedule.stages],
    "keep": [keep(stage) for stage in schedule.stages],
    "frozen": list(schedule.frozen_layers),
    "parameters": dict(schedule.parameters),
    "repeats": len(last.criteria) == 1 and last.acts != "before",
    "acts": last.acts,
  }
