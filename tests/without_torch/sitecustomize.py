"""On `PYTHONPATH` it hides torch, which our users need not have, from a Python process."""

import importlib.machinery
import sys


class WithoutTorch(importlib.machinery.PathFinder):
  """Finds all modules but torch."""

  @classmethod
  def find_spec(cls, name, path=None, target=None):
    return None if name == "torch" else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutTorch
