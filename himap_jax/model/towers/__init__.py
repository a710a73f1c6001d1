"""Vision towers: pixels to features, up to the last feature layer.

A tower is one module and one entry of `TOWERS`, or of `OTHER_TOWERS` if it is no plain stack of layers.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.inputs import Images
from himap_jax.model.config import VisionConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import LayerNorm
from himap_jax.model.towers import clip, dinov2, internvit, mllama
from himap_jax.model.towers.common import QueryKey, TowerModule, TowerOutput, class_attention
from himap_jax.model.tracing import traced_once


@dataclasses.dataclass(frozen=True)
class Tower:
  """The modules of a tower, and the checkpoint's names of its layers and of the norm before them, if there is one."""

  embeddings: type[nn.Module]
  layer: type[nn.Module]
  layer_name: str = "layers"
  norm_name: str | None = None


TOWERS = {
  "clip_vision_model": Tower(clip.ClipEmbeddings, clip.ClipLayer, norm_name="pre_layrnorm"),
  "siglip_vision_model": Tower(clip.ClipEmbeddings, clip.ClipLayer),
  "qwen_vl_vision": Tower(clip.ClipEmbeddings, clip.ClipLayer, norm_name="pre_layrnorm"),
  "dinov2": Tower(dinov2.DinoEmbeddings, dinov2.DinoLayer, layer_name="layer"),
  "internvl_vision": Tower(dinov2.DinoEmbeddings, internvit.InternLayer, layer_name="layer"),
}


# Towers of another structure, each a whole module.
OTHER_TOWERS: dict[str, type[TowerModule]] = {"mllama_vision_model": mllama.MllamaTower}


def vision_tower(config: VisionConfig, kernels: Kernels) -> TowerModule:
  """The tower that a model's `vision_tower` is."""
  return OTHER_TOWERS.get(config.model_type, VisionTower)(config, kernels)


class Encoder(TowerModule):
  """Layers up to the last feature layer; returns all hidden states, the input first, and the last queries and keys."""

  @nn.compact
  def __call__(self, x: Float[Array, "B S D"]) -> tuple[list[Float[Array, "B S D"]], QueryKey]:
    tower = TOWERS[self.config.model_type]
    layer, hidden_states, query_key = traced_once(tower.layer), [x], None
    for index in range(self.config.num_layers_run):
      x, query_key = layer(self.config, self.kernels, name=f"{tower.layer_name}_{index}")(x)
      hidden_states.append(x)
    return hidden_states, query_key


class VisionTower(TowerModule):
  """Pixels to the connector's input."""

  @nn.compact
  def __call__(self, images: Images) -> TowerOutput:
    """The output for every tile, `[B·P, …]`."""
    tower = TOWERS[self.config.model_type]
    pixel_values = images.pixels.reshape(-1, *images.pixels.shape[2:])
    x = tower.embeddings(self.config, self.kernels, name="embeddings")(pixel_values)
    if tower.norm_name is not None:
      x = LayerNorm(self.config.layer_norm_eps, name=tower.norm_name)(x)
    hidden_states, (query, key) = Encoder(self.config, self.kernels, name="encoder")(x)
    features = jnp.concatenate([hidden_states[layer] for layer in self.config.feature_layers], axis=-1)
    attention = class_attention(query, key) if self.config.has_class_token else None
    output = TowerOutput(features, attention, key)
    return jax.tree.map(lambda y: y[:, 1:], output) if self.config.select_strategy == "default" else output
