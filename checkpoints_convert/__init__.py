"""Conversion of checkpoints into the layouts that himap_jax reads."""
