"""Schedules and pruning flags of any text, and files of schedules with any JSON."""

import collections
import functools
import json
import pathlib
from typing import Any

import numpy as np
from absl import flags
from campaign import bounded, mutations
from campaign.trials import Part, Trial
from hypothesis import strategies as st

from checkpoints_convert.errors import CheckpointError
from himap_jax.errors import UserError
from himap_jax.pruning.config import PruningConfig
from himap_jax.pruning.methods import METHODS
from himap_jax.run import pruning_flags

INPUTS = 100
NUMBER = st.sampled_from(
  ["0", "1", "2", "8", "-1", "288", "50%", "0%", "1e999%", "nan%", "inf%", "9" * 30, "²", "", " ", "x"]
)
LIST = st.lists(NUMBER | mutations.TEXTS, min_size=1, max_size=3).map(",".join)
METHOD = st.lists(st.sampled_from([*METHODS, "", "x"]), min_size=1, max_size=3).map("+".join)
PARAMETERS = st.lists(st.tuples(st.sampled_from(["threshold", "x", ""]), NUMBER).map(":".join), min_size=1, max_size=2)
FLAG = (
  METHOD.map("--method={}".format)
  | LIST.map("--prune_layers={}".format)
  | LIST.map("--keep={}".format)
  | PARAMETERS.map(lambda own: f"--method_parameters={','.join(own)}")
  | st.sampled_from(["--restore", "--keep_positions"])
  | mutations.TEXTS.map("--{}".format)
)
COUNTS = st.lists(st.integers(-1, 40) | mutations.VALUES, max_size=3) | mutations.VALUES
FILE = st.fixed_dictionaries({"method": METHOD | mutations.VALUES, "prune_layers": COUNTS, "keep": COUNTS})


def prepare(kept: pathlib.Path) -> Trial:
  return bounded.trial(_attempts, INPUTS, kept)


def _attempts(random: np.random.Generator, directory: pathlib.Path, count: int) -> collections.Counter[str]:
  def parsed(given: list[str]) -> str:
    return _built(lambda: pruning_flags.parse(" ".join(given)))

  def from_file(fields: Any) -> str:
    (directory / "schedule.json").write_text(json.dumps(fields))
    return _built(functools.partial(_from_file, directory / "schedule.json"))

  third = count // 3
  found = collections.Counter(mutations.structured(random, third, st.lists(FLAG, max_size=4), parsed))
  found.update(mutations.structured(random, third, FILE, from_file))
  found.update(mutations.structured(random, count - 2 * third, st.lists(RUN_FLAG, max_size=4), _run_flags))
  return found


def _from_file(path: pathlib.Path) -> PruningConfig:
  from himap_jax.run import model_flags

  values = flags.FLAGS
  values.unparse_flags()
  values(["", f"--schedule={path}"])
  try:
    return model_flags.values_from_flags()["pruning"]
  finally:
    values["schedule"].value = None


# Flags of a run besides its pruning.
NAMES = (
  "max_new_tokens",
  "temperature",
  "top_p",
  "seed",
  "prompt_buckets",
  "max_image_tokens",
  "prompt_template",
  "mesh",
)
NAMES += ("dtype", "batch_size", "prefill_batch_size", "emit", "columns", "prompts", "output", "image_dir", "split")
TEXT = (
  NUMBER
  | LIST
  | st.sampled_from(["data:1,tensor:2", "data:x", "tensor:-1", "id:", "question:", "<image>{question}", "float32"])
)
RUN_FLAG = st.tuples(st.sampled_from(NAMES), TEXT).map(lambda own: f"--{own[0]}={own[1]}")


def _run_flags(given: list[str]) -> str:
  from himap_jax.run.flags import config_from_flags

  values = flags.FLAGS
  for name in NAMES:
    values[name].unparse()
  values.unparse_flags()
  try:
    values(["", "--prompts=a.jsonl", "--output=b.jsonl", *given])
    config_from_flags()
  except (UserError, flags.Error):
    return "refused"
  return "read"


def _built(parse: Any) -> str:
  """Parses, and makes the schedule of models of two depths."""
  try:
    config = parse()
    text = pruning_flags.text(config)
    for num_layers, num_tokens in ((4, 16), (32, 576)):
      schedule = config.schedule(num_layers, num_tokens)
      counts = [stage.keep for stage in schedule.stages]
      assert all(1 <= count <= num_tokens for count in counts) and counts == sorted(counts, reverse=True), counts
  except (UserError, CheckpointError) as error:
    assert "\n" not in str(error), error
    return "refused"
  assert pruning_flags.parse(text).method == config.method
  return "read"


PART = Part("Any schedule and any flags are read or refused in one line.", prepare, INPUTS)
