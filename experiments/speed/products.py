"""Times the matrix products of a 7B layer in XLA and in PyTorch, which limit a prefill on this machine.

    python -m experiments.speed.products

Bfloat16 with float32 accumulation; the two take turns. Needs PyTorch: `pip install -e '.[test]'`.
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from absl import flags

from experiments.shared import tabular
from experiments.speed import side
from himap_jax.engine import sharding
from himap_jax.model.linear import matmul
from himap_jax.run import command, flag_values
from himap_jax.run.progress import Progress

_ROWS = flags.DEFINE_list("rows", ["1", "4", "167", "671"], "Rows of the left factor: tokens per product.")
_TURNS = flags.DEFINE_integer("turns", 11, "Repetitions per product.", lower_bound=1)

SIZES = ((4096, 4096), (4096, 11_008), (11_008, 4096))  # in and out features of LLaVA-1.5-7B's decoder
COPIES = 6  # of each weight, so that none is still in the processor's cache


def ours(rows: int, features: int, out: int) -> Callable[[], Any]:
  """Products of one activation with every copy of a weight."""
  is_decoding = rows <= 8
  x = jnp.ones((rows, 1, features) if is_decoding else (1, rows, features), jnp.bfloat16)
  weights = [jax.random.normal(jax.random.key(i), (out, features), jnp.bfloat16) for i in range(COPIES)]
  kernels = sharding.kernels_for(sharding.make_mesh())
  program = jax.jit(lambda x, weights: [matmul(x, weight, kernels) for weight in weights]).lower(x, weights).compile()
  return lambda: jax.block_until_ready(program(x, weights))


def pytorch(rows: int, features: int, out: int) -> Callable[[], Any]:
  x = torch.ones(rows, features, dtype=torch.bfloat16)
  weights = [torch.randn(out, features, dtype=torch.bfloat16) for _ in range(COPIES)]
  return lambda: [torch.nn.functional.linear(x, weight) for weight in weights]


def measure(count: int, features: int, out: int) -> tuple[str, ...]:
  """A row of the table: medians of both sides, which take turns."""
  calls = ours(count, features, out), pytorch(count, features, out)
  for call in calls:
    call()
  turns = [[side.seconds(call) / COPIES for call in calls] for _ in range(_TURNS.value)]
  pair = [statistics.median(taken) for taken in zip(*turns, strict=True)]
  operations, num_bytes = 2 * count * features * out, 2 * features * out
  speeds = [f"{operations / taken / 1e9:.0f}" for taken in pair]
  speeds += [f"{num_bytes / taken / 1e9:.1f}" for taken in pair]
  return *map(str, (count, features, out)), *speeds, f"{pair[0] / pair[1]:.2f}"


def run() -> int:
  sizes = list(itertools.product(flag_values.numbers(_ROWS, int), SIZES))
  with Progress(len(sizes), "product", "products") as progress:
    rows = []
    for count, (features, out) in sizes:
      rows.append(measure(count, features, out))
      progress.update()
  header = "rows", "in", "out", "XLA, GFLOP/s", "PyTorch, GFLOP/s", "XLA, GB/s", "PyTorch, GB/s", "time ÷ PyTorch's"
  print("\n".join(tabular.markdown(header, rows)))
  return 0


if __name__ == "__main__":
  command.start_action("products", run, resumes=False)
