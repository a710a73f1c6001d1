"""Averages two adapters of the demo model, weight by weight: what one training forgot of another comes back.

    python -m experiments.average_adapters --adapters=2.safetensors,3.safetensors --shares=0.4,0.6 --adapter=adapter.safetensors

Both have to lie on one path of training, one begun from the other (Wortsman et al., arXiv 2109.01903).
"""

import operator
import pathlib

import jax
from absl import app, flags

from experiments.demo_model import export_adapter, import_adapter

_ADAPTERS = flags.DEFINE_list("adapters", None, "What to average.", required=True)
_SHARES = flags.DEFINE_list("shares", None, "The share of each; together 1.", required=True)
_ADAPTER = flags.DEFINE_string("adapter", None, "Where to write the mean.", required=True)


def main(_) -> None:
  shares = [float(share) for share in _SHARES.value]
  adapters = [import_adapter(path) for path in _ADAPTERS.value]
  if len(shares) != len(adapters) or abs(sum(shares) - 1) > 1e-6:
    raise app.UsageError(f"--shares={','.join(_SHARES.value)}: one for each adapter, and together 1")
  mean = jax.tree.map(lambda *leaves: sum(map(operator.mul, shares, leaves)), *adapters)
  export_adapter(pathlib.Path(_ADAPTER.value), *mean)


if __name__ == "__main__":
  app.run(main)
