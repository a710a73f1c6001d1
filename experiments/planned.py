"""TPUs that are not there: meshes of their devices, and parameters as shapes with shardings on them."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import PyTree

from himap_jax import sharding
from himap_jax.config import LlavaConfig
from himap_jax.llava import abstract_params, logical_axes


def without_devices() -> None:
  """Has libtpu compile for devices that are described, on a machine that has none; to be called before JAX is used."""
  jax.config.update("jax_platforms", "cpu")
  os.environ["JAX_PLATFORMS"] = "cpu"  # of processes that this one begins
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@functools.lru_cache
def mesh_of(topology: str, tensor: int) -> Mesh:
  """The devices of a slice, as `v5e:2x4`, of which `tensor` share the heads.

  Raises:
    ValueError: libtpu does not know the topology, or `tensor` does not divide its devices.
  """
  options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  if topology.startswith("v4:"):
    options["chip_config_name"] = "megacore"  # one device for both cores of a chip
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise ValueError(
      f"{topology}: {str(error).splitlines()[0]}; it needs libtpu (pip install -e '.[tpu]') and a name such as v5e:2x4"
    ) from error
  if len(devices) % tensor:
    raise ValueError(f"{topology} has {len(devices)} devices, which tensor:{tensor} does not divide")
  return sharding.make_mesh(len(devices) // tensor, tensor, devices=devices)


def params_on(mesh: Mesh, config: LlavaConfig) -> PyTree:
  """The parameters in bfloat16 as `jax.ShapeDtypeStruct`s with their shardings."""
  return sharding.placed(abstract_params(config, jnp.bfloat16), logical_axes(config), config, mesh)
