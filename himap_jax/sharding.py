"""The one place that decides shardings: rows of a batch over devices, parameters on every device."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(batch_size: int, devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh with one axis, `data`, of as many devices as divide the batch evenly."""
  devices = jax.devices() if devices is None else devices
  return Mesh(np.array(devices[: math.gcd(batch_size, len(devices))]), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
  """Of parameters."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
  """Of inputs: the leading axis over `data`."""
  return NamedSharding(mesh, PartitionSpec("data"))
