"""Several processes in one run: joining them, sharing the rows, agreeing on the next batch, ending on a failure.

All processes run the same programs in the same order on all devices. Each prepares its own share of the rows.
"""

import dataclasses
import os
import re
import sys
import threading
import zlib
from collections.abc import Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from himap_jax.errors import UserError

HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as failed, and the others exit
LEAVING_SECONDS = 10  # that a process which failed waits at exit for the others

_LOST = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UNAVAILABLE|UNKNOWN): ")


@dataclasses.dataclass(frozen=True)
class Share:
  """Rows that a process prepares.

  Attributes:
    index: the share, 0 … count − 1.
    count: number of shares; fewer than processes if `tensor` spans several.
    is_written_here: whether this process reports the answers of its share; one process per share does.
  """

  index: int = 0
  count: int = 1
  is_written_here: bool = True


def initialize(
  *, from_environment: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Joins the other processes of a run, before any device is used; does nothing for a single process.

  Args:
    from_environment: let JAX find the processes, as on a Cloud TPU slice or under SLURM.
    coordinator: otherwise the address `host:port` of the first process.

  Raises:
    UserError: the settings contradict each other, or the other processes cannot be reached.
  """
  given = [value is not None for value in (coordinator, num_processes, process_id)]
  if any(given) and not all(given):
    raise UserError("--coordinator, --num_processes and --process_id belong together")
  if from_environment and any(given):
    raise UserError("--distributed finds the other processes itself and takes no --coordinator")
  if not from_environment and not all(given):
    return
  if all(given) and not 0 <= process_id < num_processes:
    raise UserError(f"--process_id must be from 0 to {num_processes - 1}, but is {process_id}")
  if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
    raise UserError(f"--coordinator={coordinator} is not an address with a port, such as host:1234")
  jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, and the process would go on
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except (RuntimeError, ValueError) as error:
    first, *_ = str(error).splitlines() or [type(error).__name__]
    raise UserError(f"cannot join the other processes ({first})") from error


def share(mesh: Mesh) -> Share:
  """The share of this process; raises `UserError` if the rows of two processes overlap in part."""
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
  """Whether this process does the work that is done only once."""
  return jax.process_index() == 0


def is_lost(error: Exception) -> bool:
  """Whether an error of a program says that another process ended; JAX raises `ValueError` if it was the first call."""
  is_from_program = isinstance(error, jax.errors.JaxRuntimeError) or _LOST.match(str(error)) is not None
  return is_from_program and jax.process_count() > 1


def leave(status: int) -> NoReturn:
  """Exits; as one of several processes soon, also if JAX waits at exit for others, which may wait for this one."""
  if status and jax.distributed.is_initialized():
    timer = threading.Timer(LEAVING_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
  sys.exit(status)


def give_up(name: str, error: Exception) -> NoReturn:
  """Reports that another process ended, and exits at once: JAX would wait for the other at exit."""
  print(
    f"{name}: another process of this run ended or cannot be reached ({str(error).splitlines()[0]}); the answers so "
    "far are kept: start the same command again, with any number of processes",
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)


def fullest(counts: Sequence[float]) -> int | None:
  """The index of the largest count over all processes, the same in each; None if all counts are zero."""
  total = sum_over_processes(counts)
  return int(total.argmax()) if total.any() else None


def is_equal(text: str, among: Share | None = None) -> bool:
  """Whether a text is the same in all processes, or in those of every share; the same answer in each process.

  Args:
    among: this process's share, if processes of the same share are compared.
  """
  if jax.process_count() == 1:
    return True
  group = 0 if among is None else among.index
  own = multihost_utils.process_allgather(np.array([group, zlib.crc32(text.encode())], np.uint32))
  return len(np.unique(own, axis=0)) == len(np.unique(own[:, 0]))


def sum_over_processes(values: Sequence[float | int] | np.ndarray) -> np.ndarray:
  """Element-wise sum over all processes."""
  values = np.asarray(values)
  return multihost_utils.process_allgather(values).sum(axis=0) if jax.process_count() > 1 else values


def sum_and_min(added: int, compared: int) -> tuple[int, int]:
  """The sum of the first number and the minimum of the second, over all processes."""
  if jax.process_count() == 1:
    return added, compared
  own = multihost_utils.process_allgather(np.array([added, compared]))
  return int(own[:, 0].sum()), int(own[:, 1].min())
