"""One side of the comparison is PyTorch."""

import pytest


@pytest.fixture(autouse=True)
def with_torch(monkeypatch):
  monkeypatch.delenv("PYTHONPATH")
