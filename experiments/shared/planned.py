"""Absent TPUs and GPUs: meshes of their devices, and models and inputs as shapes with shardings."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from checkpoints_convert.int8 import abstract_int8
from experiments.shared import geometries
from himap_jax.engine import programs, sharding
from himap_jax.errors import UserError
from himap_jax.inputs import Inputs
from himap_jax.model.network import Model, Network, abstract_params, logical_axes
from himap_jax.model.quantization import map_int8

# NVIDIA's H200, as XLA describes a GPU (`stream_executor.GpuTargetConfigProto`).
H200 = """
gpu_device_info {
  name: "H200"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  runtime_version: "12.8.0"
  driver_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "H200"
"""


def without_devices() -> None:
  """Lets JAX compile for TPUs and GPUs on a machine without any; must be called before JAX is used."""
  jax.config.update("jax_platforms", "cpu")
  os.environ["JAX_PLATFORMS"] = "cpu"  # for child processes
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


@functools.lru_cache
def mesh_of(topology: str, tensor: int) -> Mesh:
  """The mesh of a slice such as `v5e:2x4`, with `tensor` devices sharing the heads; `UserError` if there is none."""
  options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  if topology.startswith("v4:"):
    options["chip_config_name"] = "megacore"  # one device for both cores of a chip
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise UserError(
      f"{topology}: {str(error).splitlines()[0]}; it needs libtpu (pip install -e '.[tpu]') and a name such as v5e:2x4"
    ) from error
  if tensor < 1 or len(devices) % tensor:
    raise UserError(f"{topology} has {len(devices)} devices, which tensor:{tensor} does not divide")
  return sharding.make_mesh(len(devices) // tensor, tensor, devices=devices)


@functools.lru_cache
def gpus(tensor: int) -> Mesh:
  """A mesh of H200s that share the heads; `UserError` without JAX's plugin for CUDA."""
  options = {"topology": f"1x1x{tensor}", "target_config": H200}
  try:
    devices = topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices
  except RuntimeError as error:
    raise UserError(f"{str(error).splitlines()[0]}; it needs pip install -e '.[cuda]'") from error
  return sharding.make_mesh(tensor=tensor, devices=devices)


def shapes_on(
  mesh: Mesh, geometry: str, *, batch_size: int, num_text_slots: int, int8_weights: bool = False
) -> tuple[Model, Inputs, jax.ShapeDtypeStruct]:
  """A bfloat16 model, a batch and its seeds, as `jax.ShapeDtypeStruct`s with shardings on a mesh."""
  config = sharding.with_divisible_key_heads(geometries.model_of(geometry), mesh)
  params = sharding.placed(abstract_params(config, jnp.bfloat16), logical_axes(config), config, mesh)
  model = Model(
    map_int8(abstract_int8, params) if int8_weights else params,
    Network(config, jnp.bfloat16, sharding.kernels_for(mesh)),
  )
  pictures = {"image_shape": geometries.image_shape(config), "size": geometries.image_size(config)}
  batch = {"batch_size": batch_size, "num_text_slots": num_text_slots}
  return model, *programs.abstract_inputs(config, mesh, **batch, **pictures)
