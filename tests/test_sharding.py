import jax
import pytest

from himap_jax import sharding


@pytest.mark.parametrize("batch_size, num_devices", [(1, 1), (2, 2), (6, 6), (7, 7), (8, 8), (9, 3), (11, 1), (16, 8)])
def test_as_many_devices_as_divide_the_batch(batch_size, num_devices):
  mesh = sharding.make_mesh(batch_size)
  assert mesh.axis_names == ("data",) and mesh.devices.tolist() == jax.devices()[:num_devices]
