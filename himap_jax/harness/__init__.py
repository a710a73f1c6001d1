"""The plug-in for lmms-eval, which finds it by its entry point `lmms_eval.models`."""

from typing import Any


def manifest() -> Any:
  """How lmms-eval loads `--model himap_jax`."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id="himap_jax", simple_class_path="himap_jax.harness.lmms.HimapJax")
