"""Multimodal LLMs with visual-token pruning in JAX."""

from himap_jax.checkpoint import LoadedModel as LoadedModel
from himap_jax.checkpoint import load as load
from himap_jax.engine.engine import GenerationConfig as GenerationConfig
from himap_jax.engine.sampling import Sampling as Sampling
from himap_jax.errors import UserError as UserError
from himap_jax.generation import Answer as Answer
from himap_jax.generation import InputConfig as InputConfig
from himap_jax.generation import generate as generate
from himap_jax.pruning.methods import PruningConfig as PruningConfig
from himap_jax.pruning.methods import build_schedule as build_schedule
from himap_jax.pruning.schedule import Schedule as Schedule
from himap_jax.pruning.schedule import Stage as Stage
