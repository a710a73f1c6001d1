"""Prefill and decode time against no pruning, measured side by side."""

import dataclasses
from typing import Any

import jax
import numpy as np

from himap_jax.engine.engine import Engine
from himap_jax.inputs import Inputs

ROW_ID = "timing"


@dataclasses.dataclass(frozen=True)
class Timing:
  """How times are measured: on a batch of questions, tokens decoded for each, turns; 0 repeats measure no times."""

  batch_size: int = 1
  new_tokens: int = 16
  repeats: int = 5


def measure_times(reference: Engine, engine: Engine, inputs: Inputs, *, repeats: int) -> dict[str, Any]:
  """Runs an engine and one without pruning in turns on a batch, after a first run of each that compiles and is not counted.

  Returns:
    Medians over the turns of the ratios, `prefill_ratio` and `decode_ratio`, and of this engine's seconds;
    `compile_seconds` of its programs (reading them, where the persistent cache has them), and the device.
  """
  ids = [ROW_ID] * len(inputs.tokens)
  for warmed in (reference, engine):
    warmed(inputs, ids)
  turns = [[run(inputs, ids) for run in (reference, engine)] for _ in range(repeats)]
  times = {
    phase: np.array([[getattr(result, f"{phase}_seconds") for result in turn] for turn in turns])
    for phase in ("prefill", "decode")
  }
  return {
    **{f"{phase}_ratio": float(np.median(pairs[:, 1] / pairs[:, 0])) for phase, pairs in times.items()},
    **{f"{phase}_seconds": float(np.median(pairs[:, 1])) for phase, pairs in times.items()},
    "compile_seconds": engine.compile_seconds,
    "device": jax.devices()[0].device_kind,
  }
