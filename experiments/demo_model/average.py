"""Averages adapters of the demo model, which recovers some of what later training forgot.

    python -m experiments.demo_model.average --adapters=2.safetensors,3.safetensors --shares=0.5,0.5 --adapter=…

As in Wortsman et al. (arXiv 2109.01903); the adapters must lie on one path of training, each initialised from the one
before.
"""

import pathlib

from absl import app, flags

from experiments.demo_model.adapter import Adapter, average
from himap_jax.run import command

_ADAPTERS = flags.DEFINE_list("adapters", None, "Adapters to average.", required=True)
_SHARES = flags.DEFINE_list("shares", None, "Share of each adapter; they sum to 1.", required=True)
_ADAPTER = flags.DEFINE_string("adapter", None, "Where to write the mean.", required=True)


def run() -> int:
  mean = average([Adapter.read(path) for path in _ADAPTERS.value], command.numbers(_SHARES, float))
  mean.save(pathlib.Path(_ADAPTER.value))
  return 0


if __name__ == "__main__":
  app.run(lambda argv: command.execute("experiments.demo_model.average", argv, run))
