"""The products' own gradients against automatic differentiation of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from himap_jax.model.kernels import cpu, xla
from himap_jax.model.linear import matmul


@pytest.mark.sampled
@pytest.mark.parametrize(("in_features", "out_features"), [(24, 8), (8, 24), (8, 8)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kernels", [xla.KERNELS, cpu.KERNELS], ids=["xla", "cpu"])
def test_matmul_and_its_gradients_are_those_of_the_formula(in_features, out_features, dtype, kernels):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 5, in_features), dtype)
  weight = jax.random.normal(keys[1], (out_features, in_features), dtype)
  target = jax.random.normal(keys[2], (2, 5, out_features), dtype)

  def formula(x, weight):
    return (x.reshape(10, -1) @ weight.T).reshape(2, 5, -1)

  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  expected, expected_vjp = jax.vjp(formula, x.astype(jnp.float32), weight.astype(jnp.float32))
  y, vjp = jax.vjp(lambda x, weight: matmul(x, weight, kernels), x, weight)
  for ours, theirs in zip([y, *vjp(target)], [expected, *expected_vjp(target.astype(jnp.float32))], strict=True):
    assert ours.dtype == dtype
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=tolerance, atol=tolerance)
