"""The one place that decides shardings: rows of a batch over devices, parameters on every device."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(batch_size: int) -> Mesh:
  """A mesh with one axis, `data`, of as many devices as divide the batch evenly."""
  devices = jax.devices()
  size = max(count for count in range(1, len(devices) + 1) if batch_size % count == 0)
  return Mesh(np.array(devices[:size]), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
  """Of parameters."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
  """Of inputs: the leading axis over `data`."""
  return NamedSharding(mesh, PartitionSpec("data"))
