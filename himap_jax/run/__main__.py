"""Answers a file of questions about images.

    python -m himap_jax.run --flagfile=experiments/flags/demo.flags

Reads prompts, writes one JSON row per prompt as batches finish, and resumes where an earlier run stopped.
"""

from himap_jax.run import startup

startup.begin()

from collections.abc import Sequence

import jax
from absl import flags

from himap_jax.engine import processes
from himap_jax.run import command, job, model_flags
from himap_jax.run import flags as run_flags

for module in (model_flags, run_flags):  # for --help
  flags.adopt_module_key_flags(module)


def main(argv: Sequence[str]) -> None:
  """Runs the command and exits with its status."""

  def action() -> int:
    run_flags.join_processes()
    try:
      return job.run(run_flags.config_from_flags())
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      if processes.is_lost(error):
        processes.give_up("himap_jax", error)
      raise

  command.execute("himap_jax", argv, action, resumes=flags.FLAGS.resume)


if __name__ == "__main__":
  command.start("himap_jax", main, needed=("prompts", "output"))
