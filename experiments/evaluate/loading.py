"""The samples of a task: from the hub, from a directory of its parquet files, or from its authors' own files."""

import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from checkpoints_convert.messages import first_line, some
from experiments.evaluate.tasks.task import Record, Sample, Task
from himap_jax.errors import UserError
from himap_jax.run import hub, records, splits
from himap_jax.run.pictures import PictureFiles

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PARQUET = ("{config}/{split}-*", "{config}/{split}/*", "{split}-*", "{split}/*", "{split}")


def load(
  task: Task, source: str | None = None, *, split: str | None = None, limit: int | None = None
) -> Iterator[Sample]:
  """Yields a task's samples in their order; none but the pictures of GQA are held.

  Args:
    source: a directory with the parquet files as the hub lays them out or with the official files, or with directories
      of several tasks' data, called as the task or as its id on the hub; or another hub id. By default the task's own
      id: a directory of that name in the current one, else the hub.
    split: instead of the task's own.
    limit: the number of samples, all if None.

  A record that is not as it should be is a sample with an error.

  Raises:
    UserError: pyarrow is missing; the data, its split or a column does not exist; or the data cannot be read.
  """
  split = split or task.split
  rows, place = _open(task, source, split)
  numbered = ((n, record) for n, record in enumerate(rows) if _belongs(task, record))
  first = next(numbered, None)
  if first is None:
    raise UserError(f"{place} has no records of {task.title}")
  missing = [column for column in task.columns if column not in first[1]]
  if missing:
    raise UserError(f"{place} lacks the column {some(missing)}, which {task.name} needs; it has {', '.join(first[1])}")
  seen: dict[str, int] = {}
  for number, record in itertools.islice(itertools.chain([first], numbered), limit):
    sample = _sample(task, record, number)
    seen[sample.id] = count = seen.get(sample.id, 0) + 1
    yield sample if count == 1 else dataclasses.replace(sample, id=f"{sample.id}#{count}")


def _belongs(task: Task, record: Record) -> bool:
  try:
    return any(isinstance(value, records.BadRow) for value in record.values()) or task.keeps(record)
  except KeyError:  # `load` names the columns that are missing.
    return True


def _sample(task: Task, record: Record, number: int) -> Sample:
  sample = Sample(f"row {number + 1}")
  try:
    records.check_readable(record, record)
    made = task.sample(record)
    sample = dataclasses.replace(made, id=made.id or str(number))
    images = tuple(map(_picture, sample.images))
    return dataclasses.replace(sample, images=images, picture=_known_by(images[0]) if images else "")
  except (LookupError, TypeError, ValueError, AttributeError, SyntaxError) as error:
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
    return dataclasses.replace(sample, images=(), error=f"row {number + 1}: {reason}")


def _known_by(image: bytes | pathlib.Path) -> str:
  return hashlib.blake2b(image, digest_size=16).hexdigest() if isinstance(image, bytes) else str(image)


def _picture(image: Any) -> bytes | pathlib.Path:
  """The bytes or the path of an image file; raises `UserError` if it is none."""
  if isinstance(image, dict):
    image = image.get("bytes") or image.get("path")
  if isinstance(image, str):
    image = pathlib.Path(image)
  if image is None:
    raise UserError("the picture is missing")
  if not isinstance(image, bytes | pathlib.Path):
    raise UserError(f"the picture is neither bytes nor a path but of type {type(image).__name__}")
  PictureFiles().size(image if isinstance(image, bytes) else str(image))
  return image


def _open(task: Task, source: str | None, split: str) -> tuple[Iterator[Record], str]:
  """Records, and where they are, for messages."""
  if source is None:
    source = next((name for name in task.repositories if pathlib.Path(name).is_dir()), task.repository)
  directory = pathlib.Path(source)
  if directory.is_dir():
    directory = _of_several(directory, task)
    source = str(directory)
    if task.official and all(any(directory.glob(pattern)) for pattern in task.official.files):
      return _checked(task.official.read(directory, split), f"{source} ({split})"), f"{source} ({split})"
  elif not _HUB_ID.fullmatch(source):
    raise UserError(f"{source} is neither a directory nor an id on the hub, such as {task.repository}")
  own = "/".join(filter(None, (source, task.config, split)))
  rows = _checked(_rows(source, task.config, split), own)
  if task.pictures:
    place = f"{source}/{task.pictures}/{split}"
    pictures = {row.get("id"): row.get("image") for row in _checked(_rows(source, task.pictures, split), place)}
    rows = (row | {"image": pictures.get(row.get("imageId"))} for row in rows)
  return rows, own


def _of_several(directory: pathlib.Path, task: Task) -> pathlib.Path:
  """The directory of a task's data in one that has several tasks', or else that directory itself."""
  names = (task.name, *task.repositories, *(name.rpartition("/")[2] for name in task.repositories))
  for own in filter(pathlib.Path.is_dir, map(directory.joinpath, names)):
    if own.name != task.config or (own / task.config).is_dir():  # it is not the configuration of the same name
      return own
  return directory


def _checked(rows: Iterable[Record], place: str) -> Iterator[Record]:
  """Turns what goes wrong in reading into errors of a line."""
  try:
    yield from rows
  except UserError:
    raise
  except KeyError as error:
    raise UserError(f"{place}: the official files lack {error}") from error
  except Exception as error:  # The hub's client also raises errors of its HTTP library.
    raise UserError(f"{place} cannot be read: {first_line(error)}") from error


def _rows(source: str, config: str | None, split: str) -> Iterator[Record]:
  """The rows of a split's parquet files, in a directory or on the hub; of the hub each is downloaded when it is reached."""
  directory = pathlib.Path(source)
  if directory.is_dir():
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.parquet"))
    path_of = directory.joinpath
  else:
    names = sorted(hub.list_files(source))
    path_of = functools.partial(hub.download, source)
  for name in _of_split(names, source, config, split):
    yield from (record.fields for record in records.open_records(path_of(name)).read())


def _of_split(names: Sequence[str], source: str, config: str | None, split: str) -> list[str]:
  for pattern in _PARQUET:
    own = fnmatch.filter(names, f"{pattern.format(config=config or 'data', split=split)}.parquet")
    if own:
      splits.check_complete(source, own, names)
      return own
  has = some([name for name in names if name.endswith(".parquet")]) or "no parquet files"
  raise UserError(f"{source} has neither {config or 'data'}/{split}-*.parquet nor official files; it has {has}")
