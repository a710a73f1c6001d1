"""The trained parts of the demo model: projector, low-rank updates, whitening, and the file they are kept in.

Axes: B images, A answer tokens, F features of the tower, V vocabulary.
"""

import dataclasses
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from checkpoints_convert.demo.assemble import read_adapter
from experiments.demo_data import Batch
from himap_jax.linear import Linear, matmul
from himap_jax.llava import Llava

LORA_SCALE = 2.0
WHITENING_FLOOR = 1e-2  # in units of squared features; the largest variance is about 20


def init_lora(key: jax.Array, language_model: dict[str, Any], rank: int) -> dict[str, dict[str, jax.Array]]:
  """`{path of a linear layer: {"a": [rank, in], "b": [out, rank]}}` for every linear layer of the decoder; b is zero."""
  lora = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(language_model):
    names = [entry.key for entry in path]
    if names[-2].endswith("_proj") and names[-1] == "weight":
      key, subkey = jax.random.split(key)
      out_features, in_features = leaf.shape
      a = jax.random.normal(subkey, (rank, in_features)) * in_features**-0.5
      lora["/".join(["language_model", *names[:-1]])] = {"a": a, "b": jnp.zeros((out_features, rank))}
  return lora


def apply_lora(lora: dict[str, dict[str, jax.Array]]) -> Any:
  """Adds the low-rank updates to the linear layers of whatever module runs in this context."""

  def interceptor(call, args, kwargs, context):
    y = call(*args, **kwargs)
    update = lora.get("/".join(context.module.path)) if isinstance(context.module, Linear) else None
    if update is None:
      return y
    return y + LORA_SCALE * matmul(matmul(args[0], update["a"]), update["b"])

  return nn.intercept_methods(interceptor)


@dataclasses.dataclass(frozen=True)
class Whitening:
  """An affine map of tower features to zero mean and about unit covariance.

  Attributes:
    mean: `[F]`.
    matrix: `[F, F]`, symmetric.
  """

  mean: jax.Array
  matrix: jax.Array

  def __call__(self, features: Float[np.ndarray, "P F"]) -> Float[np.ndarray, "P F"]:
    """Whitens."""
    return (features - np.asarray(self.mean)) @ np.asarray(self.matrix)

  def fold(self, projector: dict[str, Any]) -> dict[str, Any]:
    """The projector on features, given the projector on whitened features."""
    weight = projector["linear_1"]["weight"] @ self.matrix
    bias = projector["linear_1"]["bias"] - weight @ self.mean
    return {**projector, "linear_1": {"weight": weight, "bias": bias}}

  def unfold(self, projector: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `fold`."""
    weight, bias = projector["linear_1"]["weight"], projector["linear_1"]["bias"]
    whitened = jnp.linalg.solve(self.matrix, weight.T).T
    return {**projector, "linear_1": {"weight": whitened, "bias": bias + weight @ self.mean}}


def measure_whitening(features: Float[np.ndarray, "P F"]) -> Whitening:
  """Measures mean and covariance of tower features; variances below `WHITENING_FLOOR` are not amplified further."""
  features = features.astype(np.float64)
  variances, axes = np.linalg.eigh(np.cov(features.T))
  matrix = (axes / np.sqrt(variances + WHITENING_FLOOR)) @ axes.T
  return Whitening(jnp.asarray(features.mean(0), jnp.float32), jnp.asarray(matrix, jnp.float32))


def init_projector(key: jax.Array, params: Any) -> dict[str, Any]:
  """A projector on whitened features whose image tokens begin as large as the text's embeddings."""
  keys = jax.random.split(key)
  size = jnp.sqrt(jnp.mean(jnp.square(params["language_model"]["embed_tokens"]["weight"])))
  (hidden, features), (width, _) = (
    params["multi_modal_projector"][layer]["weight"].shape for layer in ("linear_1", "linear_2")
  )
  return {
    "linear_1": {"weight": jax.random.normal(keys[0], (hidden, features)) * features**-0.5, "bias": jnp.zeros(hidden)},
    "linear_2": {
      "weight": jax.random.normal(keys[1], (width, hidden)) * 1.5 * size * hidden**-0.5,
      "bias": jnp.zeros(width),
    },
  }


def answer_logits(model: Llava, params: Any, lora: Any, batch: Batch) -> jax.Array:
  """Logits `[B, A, V]` of every answer token, given the tokens before it."""

  def forward(bound: Llava) -> jax.Array:
    x = bound.merge(batch.tokens, batch.image_start, bound.encode_images(batch.pixel_values)[0])
    x, _ = bound.language_model(
      x, batch.positions, first=0, last=model.config.text.num_hidden_layers, mask=batch.mask()
    )
    return bound.logits(jnp.take_along_axis(x, batch.answer_slots[:, :, None], axis=1))

  with apply_lora(lora):
    return model.apply({"params": params}, method=forward)


def export_adapter(path: pathlib.Path, projector: Any, lora: Any) -> None:
  """Writes projector and LoRA in bfloat16 under the checkpoint's names."""
  tensors = {}
  for layer, entry in projector.items():
    for name, value in entry.items():
      tensors[f"multi_modal_projector.{layer}.{name}"] = value
  for layer, entry in lora.items():
    name = layer.replace("/", ".").replace("layers_", "layers.")
    tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = entry["a"], entry["b"]
  partial = path.with_suffix(".partial")
  save_file(
    {name: np.asarray(value.astype(jnp.bfloat16)) for name, value in tensors.items()},
    partial,
    metadata={"lora_scale": str(LORA_SCALE)},
  )
  partial.replace(path)


def import_adapter(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads the projector and LoRA that `export_adapter` wrote."""
  tensors, scale = read_adapter(pathlib.Path(path))
  if scale != LORA_SCALE:
    raise ValueError(f"{path}: its lora_scale is {scale}, that of this training {LORA_SCALE}")
  projector, lora = {}, {}
  for name, value in tensors.items():
    *layer, leaf = name.split(".")
    if layer[0] == "multi_modal_projector":
      projector.setdefault(layer[1], {})[leaf] = jnp.asarray(value)
    else:
      key = "/".join(layer).replace("layers/", "layers_")
      lora.setdefault(key, {})[leaf.removeprefix("lora_")] = jnp.asarray(value)
  return projector, lora


def average(adapters: Sequence[Any], shares: Sequence[float]) -> Any:
  """The weighted mean of adapters, as `import_adapter` reads them.

  Raises:
    ValueError: the shares are not one for each, or not 1 together.
  """
  if len(shares) != len(adapters) or abs(sum(shares) - 1) > 1e-6:
    raise ValueError(f"{len(adapters)} shares are needed that together are 1, not {shares}")
  return jax.tree.map(lambda *leaves: sum(map(operator.mul, shares, leaves)), *adapters)
