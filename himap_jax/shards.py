"""The output of several processes: a file of each while they run, one file in the end."""

import json
import pathlib

from himap_jax.hosts import Share
from himap_jax.output import OutputWriter


def path(output: pathlib.Path, share: Share) -> pathlib.Path:
  """Where a share's answers are written while a run goes on."""
  if share.count == 1:
    return output
  return output.with_name(f"{output.name}.shard-{share.index:05d}-of-{share.count:05d}")


def merge(output: pathlib.Path, *, replace: bool = False) -> None:
  """Moves the rows of all shards into the output, each id once; an answer takes the place of an earlier error.

  Killed at any moment, the next call ends it.

  Args:
    output: the output file.
    replace: whether its own rows are dropped.

  Raises:
    ValueError: the output cannot be written, or another run is writing it or a shard.
  """
  shards = _shards(output)
  rows = {}
  for shard in shards:
    with OutputWriter(shard, resume=True):  # not while another run writes it; without a torn row
      rows |= {row["id"]: row for row in map(json.loads, shard.read_text(encoding="utf-8").splitlines())}
  if rows:
    with OutputWriter(output, resume=not replace, retry=rows.keys()) as writer:
      writer.write(row for row_id, row in rows.items() if row_id not in writer.answered)
  remove(output)


def remove(output: pathlib.Path) -> None:
  """Removes all shards of an output."""
  for shard in _shards(output):
    shard.unlink()


def _shards(output: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in output.parent.iterdir() if path.name.startswith(f"{output.name}.shard-"))
