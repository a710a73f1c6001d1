"""Tries to break the command, the readers and the engine; figures by outcome.

    python -m tests.campaign --part=interruptions --trials=1000 --workdir=campaign_work

The same command continues; `--only` repeats one trial. Exits with 1 if a trial failed.
"""

import pathlib
import sys

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # as in the tests

from campaign import trials
from campaign.parts import PARTS

from himap_jax.run import command

FLAGS = flags.FLAGS
flags.DEFINE_enum("part", None, sorted(PARTS), "What is tried.", required=True)
flags.DEFINE_integer("trials", 100, "Trials in all.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed of all trials.", lower_bound=0)
flags.DEFINE_integer("only", None, "The one trial to repeat.", lower_bound=0)
flags.DEFINE_string("workdir", "campaign_work", "Directory for the outcomes, resumed on restart.")


def run() -> int:
  part, workdir = PARTS[FLAGS.part], pathlib.Path(FLAGS.workdir, FLAGS.part)
  done = trials.run(part, workdir, num_trials=FLAGS.trials, seed=FLAGS.seed, only=FLAGS.only)
  print(trials.table(part, done))
  if part.summary is not None:
    print(f"\n{part.summary(workdir / 'shared')}")
  return int(any(row["outcome"] == trials.FAILED for row in done))


if __name__ == "__main__":
  command.start_action("tests.campaign", run, needed=("part",))
