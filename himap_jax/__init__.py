"""LLaVA with visual-token pruning in JAX."""

from himap_jax.checkpoint import LoadedModel as LoadedModel
from himap_jax.checkpoint import load as load
from himap_jax.generation import Answer as Answer
from himap_jax.generation import generate as generate
from himap_jax.methods import build_schedule as build_schedule
from himap_jax.schedule import Schedule as Schedule
from himap_jax.schedule import Stage as Stage
