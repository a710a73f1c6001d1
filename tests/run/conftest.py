"""A small job for the tests of whole runs."""

import pytest
import running


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
  return running.changed(config, prompt_buckets=(64,), batch_size=4, max_new_tokens=2)
