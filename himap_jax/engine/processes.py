"""Several processes that run one program: who reads which prompts, what all run next, and the end of a process.

Every process runs the same programs in the same order on the devices of all. Each prepares its own share of the rows.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from himap_jax.errors import UserError

HEARTBEAT_SECONDS = 30  # a process that is silent for longer has failed, and all others end


@dataclasses.dataclass(frozen=True)
class Share:
  """Which rows a process prepares.

  Attributes:
    index: the share, 0 … count − 1.
    count: shares; as many as processes, fewer where `tensor` spans several.
    is_written_here: whether this process writes its share's answers; of the processes with the same share one does.
  """

  index: int = 0
  count: int = 1
  is_written_here: bool = True


def initialize(
  *, from_environment: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Joins the other processes of a run, before any device is used; does nothing where there is one process alone.

  Args:
    from_environment: whether JAX is to find them by itself, as on a Cloud TPU slice or under SLURM.
    coordinator: else the address `host:port` of the first process.
    num_processes: how many there are.
    process_id: which one this is.

  Raises:
    UserError: settings that do not belong together.
    RuntimeError: the others cannot be reached.
  """
  given = [value is not None for value in (coordinator, num_processes, process_id)]
  if any(given) and not all(given):
    raise UserError("--coordinator, --num_processes and --process_id belong together")
  if from_environment and any(given):
    raise UserError("--distributed finds the other processes by itself: it takes no --coordinator")
  if not from_environment and not all(given):
    return
  if all(given) and not 0 <= process_id < num_processes:
    raise UserError(f"--process_id must be from 0 to {num_processes - 1}, but is {process_id}")
  jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def share(mesh: Mesh) -> Share:
  """The share of this process.

  Raises:
    UserError: the rows of two processes overlap in part.
  """
  rows_of: dict[int, set[int]] = {}
  for (row, _), device in np.ndenumerate(mesh.devices):
    rows_of.setdefault(device.process_index, set()).add(row)
  shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
  if sum(map(len, shares)) > mesh.shape["data"]:
    raise UserError(
      f"--mesh={','.join(f'{name}:{size}' for name, size in mesh.shape.items())} gives processes rows that overlap in "
      f"part; let tensor divide the {jax.local_device_count()} devices of a process, or be a multiple of them"
    )
  own = rows_of[jax.process_index()]
  first = min(process for process, rows in rows_of.items() if rows == own)
  return Share(shares.index(tuple(sorted(own))), len(shares), first == jax.process_index())


def is_leader() -> bool:
  """Whether this process does what is done once."""
  return jax.process_index() == 0


def give_up(name: str, error: Exception) -> NoReturn:
  """Says that another process ended, and ends this one at once: JAX would wait for the other at exit.

  Args:
    name: of the command.
    error: what became of the program that all were running.
  """
  print(
    f"{name}: another process of this run ended or cannot be reached ({str(error).splitlines()[0]}); what was answered is "
    "kept: start the same command again, in any number of processes",
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)


def fullest(counts: Sequence[int]) -> int | None:
  """The index at which all processes together count most; None where all count nothing. The same in every process."""
  total = sum_over_processes(counts)
  return int(total.argmax()) if total.any() else None


def sum_over_processes(values: Sequence[float | int]) -> np.ndarray:
  """The sum over processes of numbers that each of them has."""
  values = np.asarray(values)
  return multihost_utils.process_allgather(values).sum(axis=0) if jax.process_count() > 1 else values
