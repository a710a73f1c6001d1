"""Averages adapters of the demo model, weight by weight: what a training forgot of the one that it went on from comes back.

    python -m experiments.average_adapters --adapters=2.safetensors,3.safetensors --shares=0.5,0.5 --adapter=adapter.safetensors

As Wortsman et al. do (arXiv 2109.01903); the adapters have to lie on one path of training, each begun from the one before.
"""

import pathlib

from absl import app, flags

from experiments.demo_model import average, export_adapter, import_adapter
from himap_jax import command

_ADAPTERS = flags.DEFINE_list("adapters", None, "What to average.", required=True)
_SHARES = flags.DEFINE_list("shares", None, "The share of each; together 1.", required=True)
_ADAPTER = flags.DEFINE_string("adapter", None, "Where to write the mean.", required=True)


def main(_) -> None:
  mean = average(list(map(import_adapter, _ADAPTERS.value)), command.numbers(_SHARES, float))
  export_adapter(pathlib.Path(_ADAPTER.value), *mean)


if __name__ == "__main__":
  app.run(main)
