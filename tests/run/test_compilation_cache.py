"""Where compiled programs are kept."""

import jax
import jax.numpy as jnp

from himap_jax.run import command


def compile_another(number):
  jax.jit(lambda x: jnp.sort(x) * number).lower(jnp.arange(1000.0)).compile()


def test_the_directory_may_change_and_be_none(tmp_path):
  for number, name in enumerate(("first", "second")):
    command.use_compilation_cache(str(tmp_path / name))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compile_another(number)
    assert any((tmp_path / name).iterdir())
  count = len(list(tmp_path.rglob("*")))
  command.use_compilation_cache("")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  compile_another(2)
  assert len(list(tmp_path.rglob("*"))) == count
