"""Vision towers: from pictures to features. A tower is one module and one entry of `TOWERS`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from himap_jax.inputs import Images
from himap_jax.model.config import PatchVisionConfig, VisionConfig
from himap_jax.model.kernels import Kernels
from himap_jax.model.linear import LayerNorm
from himap_jax.model.towers import clip, dinov2, internvit, mllama, qwen2_vl
from himap_jax.model.towers.common import QueryKey, TowerModule, TowerOutput, class_attention, group, pooled
from himap_jax.model.tracing import traced_once


@dataclasses.dataclass(frozen=True)
class Tower:
  """The modules of a tower for tiles, and the names of its layers and of the norms before (if any) and after them."""

  embeddings: type[nn.Module]
  layer: type[nn.Module]
  layer_name: str = "layers"
  norm_name: str | None = None
  final_norm_name: str = "post_layernorm"


# A `Tower` for tiles, all of one size; or a module of its own, from `Images` to `TowerOutput`.
TOWERS: dict[str, Tower | type[TowerModule]] = {
  "clip_vision_model": Tower(clip.ClipEmbeddings, clip.ClipLayer, norm_name="pre_layrnorm"),
  "siglip_vision_model": Tower(clip.ClipEmbeddings, clip.ClipLayer),
  "qwen_vl_vision": Tower(clip.ClipEmbeddings, clip.ClipLayer, norm_name="pre_layrnorm"),
  "dinov2": Tower(dinov2.DinoEmbeddings, dinov2.DinoLayer, layer_name="layer"),
  "internvl_vision": Tower(
    dinov2.DinoEmbeddings, internvit.InternLayer, layer_name="layer", final_norm_name="layernorm"
  ),
  "mllama_vision_model": mllama.MllamaTower,
  "qwen2_vl_vision": qwen2_vl.PatchTower,
  "qwen2_5_vl_vision": qwen2_vl.PatchTower,
  "qwen3_vl_vision": qwen2_vl.PatchTower,
}


def vision_tower(config: VisionConfig, kernels: Kernels) -> TowerModule:
  """The tower of a model: a module from `Images` to `TowerOutput`, with an output for every tile or every row."""
  tower = TOWERS[config.model_type]
  return (TileTower if isinstance(tower, Tower) else tower)(config, kernels)


def abstract_images(config: VisionConfig, height: int, width: int) -> Images:
  """A picture of a size in pixels, as `jax.ShapeDtypeStruct`s without the axis B."""
  patch = config.patch_size
  if not isinstance(config, PatchVisionConfig):
    tiles = config.tiles_per_picture
    places = None if config.tiling is None else jax.ShapeDtypeStruct((tiles, 3), jnp.int32)
    return Images(jax.ShapeDtypeStruct((tiles, 3, height, width), jnp.float32), places)
  count = config.num_patches(height, width)
  pixels = jax.ShapeDtypeStruct((count, 3 * patch**2), jnp.float32)
  return Images(pixels, jax.ShapeDtypeStruct((count, 3), jnp.int32))


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


class TileTower(TowerModule):
  """Tiles to the connector's input."""

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
    if self.config.final_norm:
      features = LayerNorm(self.config.layer_norm_eps, name=tower.final_norm_name)(features)
    attention = class_attention(query, key) if self.config.has_class_token else None
    output = TowerOutput(features, attention, key)
    if self.config.select_strategy == "default":
      output = jax.tree.map(lambda y: y[:, 1:], output)
    columns = pixel_values.shape[3] // self.config.patch_size
    if self.config.pool > 1:
      return jax.tree.map(lambda y: pooled(y, columns, self.config.pool), output)
    return group(output, columns, self.config.merge_size) if self.config.merge_size > 1 else output
