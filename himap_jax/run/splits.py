"""The files of one split of a data set: a directory that `datasets` saved, or files as the hub lays them out."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

from checkpoints_convert.messages import first_line, some
from himap_jax.errors import UserError
from himap_jax.run import hub

KINDS = {kind: (f".{kind}",) for kind in ("parquet", "csv", "arrow")} | {"json": (".jsonl", ".json")}

_DESCRIPTIONS = ("README.md", "dataset_infos.json", ".huggingface.yaml")  # which may say what files a split has
_SAVED = ("dataset_dict.json", "state.json")
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})")  # one of several files


class Files(NamedTuple):
  """Files of one kind, of `KINDS`."""

  kind: str
  paths: list[pathlib.Path]


def of_directory(directory: pathlib.Path, split: str | None) -> Files:
  """The files of a split; arguments and errors as in `records.open_records`."""
  if any((directory / name).exists() for name in _SAVED):
    import datasets  # slow to import

    try:
      saved = datasets.load_from_disk(str(directory))
    except Exception as error:  # of many types, also where there are no rows
      raise UserError(f"{directory} is no data set with rows: {first_line(error)}") from error
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    chosen = splits[_choose(str(directory), splits, split)]
    return Files("arrow", [pathlib.Path(file["filename"]) for file in chosen.cache_files])
  return _laid_out(str(directory), directory, split)


def of_hub(repository: str, split: str | None) -> Files:
  """As `of_directory`; of the hub's files only those of the split are downloaded."""
  names = hub.list_files(repository)
  if saved := [name for name in names if name in _SAVED]:
    paths = {name: hub.download(repository, name) for name in names}
    return of_directory(paths[saved[0]].parent, split)
  with tempfile.TemporaryDirectory() as empty:  # files of the same names, of which only descriptions are read
    root = pathlib.Path(empty).resolve()
    for name in names:
      path = (root / name).resolve()
      if not path.is_relative_to(root):
        raise UserError(f"{repository} names a file outside of itself: {name!r}")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(hub.download(repository, name).read_bytes() if name in _DESCRIPTIONS else b"")
    kind, paths = _laid_out(repository, root, split)
    return Files(kind, [hub.download(repository, path.relative_to(root).as_posix()) for path in paths])


def _laid_out(name: str, directory: pathlib.Path, split: str | None) -> Files:
  import datasets

  configuration, _, own = (split or "").rpartition("/")
  try:
    builder = datasets.load_dataset_builder(str(directory.resolve()), configuration or None)
  except Exception as error:  # of many types
    found = re.search(r"(?:configs|Available): \[(.*)\]", str(error))
    if found:
      known = found[1].replace("'", "")
      raise UserError(
        f"{name} has the configurations {known}; choose one and its split with --split, such as "
        f"--split={known.split(',')[0]}/test"
      ) from error
    raise UserError(f"{name} is no data set: {first_line(error)}") from error
  kind, splits = builder.name, {str(key): files for key, files in (builder.config.data_files or {}).items()}
  paths = [pathlib.Path(file) for file in splits[_choose(name, splits, own or None)]]
  other = [path.name for path in paths if path.suffix not in KINDS.get(kind, ())]
  if kind not in KINDS or other:
    raise UserError(f"{name} has files of another kind ({some(other)}); supported are parquet, csv, jsonl and arrow")
  known = (str(own) for folder in {path.parent for path in paths} for own in folder.iterdir())
  check_complete(name, map(str, paths), known)
  return Files(kind, paths)


def check_complete(name: str, chosen: Iterable[str], known: Iterable[str]) -> None:
  """Raises `UserError` if of files such as `test-00000-of-00003.parquet` some are chosen and not all are known."""
  numbers = collections.defaultdict(set)
  for stem, number, count in (found.groups() for found in map(_NUMBERED.match, known) if found):
    numbers[stem, count].add(number)
  for stem, _, count in (found.groups() for found in map(_NUMBERED.match, chosen) if found):
    num_known = len(numbers[stem, count])
    if num_known < int(count):
      raise UserError(
        f"{name} has only {num_known} of the {int(count)} files {pathlib.Path(stem).name}-*-of-{count}; download the "
        "others, or repeat the command when the Hugging Face hub can be reached"
      )


def _choose(name: str, splits: Iterable[str], split: str | None) -> str:
  known = list(splits)
  if split is None and len(known) == 1:
    return known[0]
  if split not in known:
    asked = "choose one with --split" if split is None else f"not --split={split}"
    raise UserError(f"{name} has the splits {', '.join(known)}; {asked}")
  return split
