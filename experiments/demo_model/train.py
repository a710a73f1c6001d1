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

from absl import flags

from checkpoints_convert.demo.assemble import ADAPTERS, assemble, provenance
from checkpoints_convert.demo.packages import sha256_of
from experiments.demo_model.adapter import Adapter, average
from experiments.demo_model.recipes import RECIPES, Part
from experiments.demo_model.training import Options, train
from experiments.shared import study
from himap_jax import checkpoint
from himap_jax.errors import UserError
from himap_jax.run import command

flags.DEFINE_string("workdir", None, "Directory of the parts, to resume from.", required=True)
_MODEL = flags.DEFINE_enum("model", "demo", list(ADAPTERS), "Which demo model to train.")
_ADAPTER = flags.DEFINE_string("adapter", None, "Where to write the trained parameters (safetensors).", required=True)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", sorted(command.DTYPES), "Dtype of the model; trained parameters are float32."
)
_GRADIENTS = flags.DEFINE_enum(
  "gradients", "jax", ["jax", "torch"], "What computes gradients; torch is faster on CPUs with AMX."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 40, "Steps between checkpoints.", lower_bound=1)


def run() -> int:
  if _GRADIENTS.value == "torch":
    check_torch()
  options = Options(_DTYPE.value, _GRADIENTS.value, _SAVE_EVERY.value)
  workdir, recipe = study.directory("workdir").absolute(), RECIPES[_MODEL.value]
  adapter = pathlib.Path(_ADAPTER.value)
  with command.user_error(f"--adapter: cannot write {adapter}"):  # before the training
    adapter.parent.mkdir(parents=True, exist_ok=True)
    if adapter.is_dir() or adapter.parent.resolve() == workdir:
      raise UserError(f"--adapter={adapter}: name a file outside of --workdir")
    with tempfile.TemporaryFile(dir=adapter.parent):
      pass
  for part in recipe.parts:
    directory = workdir / f"part_{part.name}"
    directory.mkdir(exist_ok=True)
    check_settings(directory / "settings.json", part, workdir)
    if not adapter_of(workdir, part.name).exists():
      layers, cache_dir = part.feature_layers, checkpoint.default_cache_dir()
      folder = workdir / f"base_{'_'.join(map(str, layers))}"
      base = assemble(folder, _MODEL.value, cache_dir=cache_dir, adapter=None, feature_layers=layers)
      start = mean(workdir, part.start) if part.start else None
      train(part, base, start, directory / "checkpoints", options).save(adapter_of(workdir, part.name))
  mean(workdir, recipe.result).save(adapter)
  return 0


def adapter_of(workdir: pathlib.Path, part: str) -> pathlib.Path:
  return workdir / f"{part}.safetensors"


def mean(workdir: pathlib.Path, shares: Mapping[str, float]) -> Adapter:
  """The mean of the adapters of parts."""
  return average([Adapter.read(adapter_of(workdir, part)) for part in shares], list(shares.values()))


def check_torch() -> None:
  """Raises `UserError` if PyTorch cannot compute the gradients."""
  if _MODEL.value != "demo":
    raise UserError("--gradients=torch: those of cross-attention are computed in JAX alone")
  if importlib.util.find_spec("torch") is None:
    raise UserError("--gradients=torch needs PyTorch; pip install -e '.[pickled]'")


def check_settings(path: pathlib.Path, part: Part, workdir: pathlib.Path) -> None:
  """Raises `UserError` if the work directory holds the part of another recipe, model, data, dtype or start."""
  settings = {"model": _MODEL.value, "dtype": _DTYPE.value} | dataclasses.asdict(part)
  settings |= {"rates": part.rates._asdict(), "shares": part.shares._asdict()}
  settings |= {"base": provenance(_MODEL.value, None, part.feature_layers)}
  settings |= {"data": {path.name: sha256_of(path) for path in sorted(pathlib.Path(__file__).parent.glob("*.json"))}}
  settings |= {"start": {own: [share, sha256_of(adapter_of(workdir, own))] for own, share in part.start.items()}}
  command.check_settings(path, settings, "use another --workdir")


if __name__ == "__main__":
  command.start_action("experiments.demo_model.train", run)
