"""Trains a demo model by its recipe, one part after another.

    python -m experiments.demo_model.train --workdir=… --adapter=adapter.safetensors

Repeating an interrupted command resumes from the last checkpoint in the work directory; a part that is done is not
trained again.
"""

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import flags

from checkpoints_convert.demo.assemble import ADAPTERS, assemble, provenance
from checkpoints_convert.demo.packages import sha256_of
from experiments.demo_model.adapter import Adapter, average
from experiments.demo_model.recipes import RECIPES, Part
from experiments.demo_model.training import Options, train
from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.run import command
from himap_jax.run.user_errors import user_error


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Directory of the parts, to resume from.", required=True)
  flags.DEFINE_enum("model", "demo", list(ADAPTERS), "Which demo model to train.")
  flags.DEFINE_string("adapter", None, "Where to write the trained parameters (safetensors).", required=True)
  dtype = "Dtype of the model; trained parameters are float32."
  flags.DEFINE_enum("dtype", "bfloat16", sorted(checkpoint.DTYPES), dtype)
  gradients = "What computes gradients; torch is faster on CPUs with AMX."
  flags.DEFINE_enum("gradients", "jax", ["jax", "torch"], gradients)
  flags.DEFINE_integer("save_every", 40, "Steps between checkpoints.", lower_bound=1)


def run(values: Any) -> int:
  """Trains what the flags say."""
  if values.gradients == "torch":
    check_torch(values.model)
  options = Options(values.dtype, values.gradients, values.save_every)
  workdir, recipe, adapter = (
    pathlib.Path(values.workdir).absolute(),
    RECIPES[values.model],
    pathlib.Path(values.adapter),
  )
  with user_error(f"--adapter: cannot write {adapter}"):  # before the training
    adapter.parent.mkdir(parents=True, exist_ok=True)
    if adapter.is_dir() or adapter.parent.resolve() == workdir:
      raise UserError(f"--adapter={adapter}: name a file outside of --workdir")
    with tempfile.TemporaryFile(dir=adapter.parent):
      pass
  for part in recipe.parts:
    directory = workdir / f"part_{part.name}"
    with user_error(f"--workdir: cannot create {directory}"):
      directory.mkdir(parents=True, exist_ok=True)
    settings = {"model": values.model, "dtype": values.dtype} | settings_of(part, values.model, workdir)
    command.check_settings(directory / "settings.json", settings, "use another --workdir")
    if not adapter_of(workdir, part.name).exists():
      layers, cache_dir = part.feature_layers, checkpoint.default_cache_dir()
      folder = workdir / f"base_{'_'.join(map(str, layers))}"
      base = assemble(folder, values.model, cache_dir=cache_dir, adapter=None, feature_layers=layers)
      start = mean(workdir, part.start) if part.start else None
      train(part, base, start, directory / "checkpoints", options).save(adapter_of(workdir, part.name))
  mean(workdir, recipe.result).save(adapter)
  return 0


def adapter_of(workdir: pathlib.Path, part: str) -> pathlib.Path:
  return workdir / f"{part}.safetensors"


def mean(workdir: pathlib.Path, shares: Mapping[str, float]) -> Adapter:
  """The mean of the adapters of parts."""
  return average([Adapter.read(adapter_of(workdir, part)) for part in shares], list(shares.values()))


def check_torch(model: str) -> None:
  """Raises `UserError` if PyTorch cannot compute the gradients."""
  if model != "demo":
    raise UserError("--gradients=torch: those of cross-attention are computed in JAX alone")
  if importlib.util.find_spec("torch") is None:
    raise UserError("--gradients=torch needs PyTorch; pip install -e '.[pickled]'")


def settings_of(part: Part, model: str, workdir: pathlib.Path) -> dict[str, Any]:
  """What a part's adapter depends on: its recipe, the model, the data and what it starts from."""
  settings = dataclasses.asdict(part) | {"rates": part.rates._asdict(), "shares": part.shares._asdict()}
  settings |= {"base": provenance(model, None, part.feature_layers)}
  settings |= {"data": {path.name: sha256_of(path) for path in sorted(pathlib.Path(__file__).parent.glob("*.json"))}}
  return settings | {"start": {own: [share, sha256_of(adapter_of(workdir, own))] for own, share in part.start.items()}}


if __name__ == "__main__":
  define_flags()
  command.start_action("experiments.demo_model.train", lambda: run(flags.FLAGS))
