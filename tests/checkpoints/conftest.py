"""A cache of the tests' own."""

import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """The folder that `$HIMAP_JAX_CACHE` names."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp("cache")
    patch.setenv("HIMAP_JAX_CACHE", str(folder))
    yield folder
