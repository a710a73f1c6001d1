"""A tiny checkpoint of every family."""

import functools
import pathlib
import shutil
from collections.abc import Callable

import tiny_anyres
import tiny_checkpoints
import tiny_cross
import tiny_gemma3
import tiny_mllama
import tiny_qwen
import tiny_qwen2_vl
import tiny_tiled


def _cross(directory: pathlib.Path) -> None:
  llava = directory.with_name("llava_of_cross")
  tiny_cross.make(tiny_checkpoints.make("clip_mha", llava), directory)
  shutil.rmtree(llava)


# By model type.
MAKERS: dict[str, Callable[[pathlib.Path], object]] = {
  "llava": functools.partial(tiny_checkpoints.make, "clip_mha"),
  "llava_cross": _cross,
  "llava_next": functools.partial(tiny_anyres.make, tiny_anyres.NEXT),
  "llava_onevision": functools.partial(tiny_anyres.make, tiny_anyres.ONEVISION),
  "internvl": functools.partial(tiny_tiled.make, "internvl"),
  "idefics3": functools.partial(tiny_tiled.make, "idefics3"),
  "smolvlm": functools.partial(tiny_tiled.make, "smolvlm"),
  "gemma3": tiny_gemma3.make,
  "mllama": tiny_mllama.make,
  "qwen": tiny_qwen.make,
  **{name: functools.partial(tiny_qwen2_vl.make, name) for name in tiny_qwen2_vl.SPECS},
}


def made(shared: pathlib.Path, name: str) -> pathlib.Path:
  """The directory of a family's checkpoint, made once."""
  directory = shared / "models" / name
  if not directory.exists():
    work = directory.with_name(f"{name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    MAKERS[name](work)
    work.rename(directory)
  return directory
