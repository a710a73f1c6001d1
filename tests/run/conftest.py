"""A small job for the tests of whole runs."""

import jax
import pytest
import running
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  """The cache folder of every run here, in this process or its own."""
  return tmp_path_factory.mktemp("run_cache")


@pytest.fixture
def config(tmp_path, loaded, cache, images):
  """The job of `running.make_config` in a directory of its own."""
  return running.make_config(tmp_path, loaded(running.NAME).directory, images, cache)


@pytest.fixture
def small(config, monkeypatch):
  """The job with one bucket and one batch: a single pair of programs for all tests that have no others of their own."""
  monkeypatch.setenv("COLUMNS", "200")  # so that the table is not wrapped
  yield running.changed(config, prompt_buckets=(64,), batch_size=4, max_new_tokens=2)
  jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module")
def compilation_cache_of_this_module_alone():
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
