"""Prefill and decode time against no pruning, measured side by side."""

from typing import Any

import jax
import numpy as np

from himap_jax.generation import Generator
from himap_jax.llava import Inputs

ROW_ID = "timing"


def measure(reference: Generator, generator: Generator, inputs: Inputs, *, repeats: int) -> dict[str, Any]:
  """Runs both generators in turns on one batch, after a first run of each that compiles and is not counted.

  Args:
    reference: without pruning; both go on to their last token whatever comes.
    generator: what is measured.
    inputs: the batch.
    repeats: how many turns.

  Returns:
    Medians over the turns of the ratios, `prefill_ratio` and `decode_ratio`, and of this generator's seconds;
    `compile_seconds` of its programs (reading them, where the persistent cache has them), and the device.
  """
  ids = [ROW_ID] * len(inputs.length)
  for warmed in (reference, generator):
    warmed(inputs, ids)
  turns = [[run(inputs, ids) for run in (reference, generator)] for _ in range(repeats)]
  times = {
    phase: np.array([[getattr(result, f"{phase}_seconds") for result in turn] for turn in turns])
    for phase in ("prefill", "decode")
  }
  return {
    **{f"{phase}_ratio": float(np.median(pairs[:, 1] / pairs[:, 0])) for phase, pairs in times.items()},
    **{f"{phase}_seconds": float(np.median(pairs[:, 1])) for phase, pairs in times.items()},
    "compile_seconds": generator.compile_seconds,
    "device": jax.devices()[0].device_kind,
  }
