"""The trained parts of the demo models, their file, and the whitening of features.

Axes: B images, A answer tokens, P patches, F features of the tower, V vocabulary.
"""

import dataclasses
import operator
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int8, Key
from safetensors.numpy import save_file

from checkpoints_convert.demo.assemble import SCALE, read_adapter
from experiments.demo_model.packing import Batch
from himap_jax.errors import UserError
from himap_jax.inputs import pytree, take_slots
from himap_jax.model.linear import matmul
from himap_jax.model.network import Model

LORA_SCALE = 2.0
LEVELS = 31  # of a number's size in a stored matrix: with its sign, six bits
WHITENING_FLOOR = 1e-2  # in units of squared features; the largest variance is about 20

PROJECTOR = "multi_modal_projector"

Weights = dict[str, dict[str, Array]]


@pytree
class Adapter:
  """Trained parameters.

  Attributes:
    projector: by layer.
    lora: low-rank updates (arXiv 2106.09685) `{"a": [rank, in], "b": [out, rank]}`, by path of a linear layer.
    cross: parameters of cross-attention layers that are trained whole, by path of their module.
  """

  projector: Weights
  lora: Weights
  cross: Weights = flax.struct.field(default_factory=dict)

  def params(self, params: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters, with the projector and `cross` in place of its own."""
    own = {(*path.split("/"), leaf): x for path, leaves in self.cross.items() for leaf, x in leaves.items()}
    own |= traverse_util.flatten_dict({PROJECTOR: self.projector})
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(flat | {path: x.astype(flat[path].dtype) for path, x in own.items()})

  def save(self, path: pathlib.Path) -> None:
    """Writes the adapter atomically, under the checkpoint's names: matrices `rounded`, all else in bfloat16."""
    tensors = traverse_util.flatten_dict({PROJECTOR: self.projector}, sep=".")
    for start, modules in (("lora_", self.lora), ("", self.cross)):
      for module, leaves in modules.items():
        tensors |= {f"{checkpoint_name(module)}.{start}{leaf}": x for leaf, x in leaves.items()}
    partial = path.with_suffix(".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name, value in tensors.items():
      if value.ndim == 2:
        stored[name], stored[f"{name}{SCALE}"] = rounded(np.asarray(value, np.float32))
      else:
        stored[name] = np.asarray(value.astype(jnp.bfloat16))
    save_file(stored, partial, metadata={"lora_scale": str(LORA_SCALE)})
    partial.replace(path)

  @classmethod
  def read(cls, path: str | pathlib.Path) -> Self:
    """Reads a saved adapter; raises `CheckpointError` if it is unreadable, `UserError` at another LoRA scale."""
    tensors, scale = read_adapter(pathlib.Path(path))
    if scale != LORA_SCALE:
      raise UserError(f"{path}: its lora_scale is {scale}, that of this training {LORA_SCALE}")
    projector, lora, cross = {}, {}, {}
    for name, value in tensors.items():
      module, leaf = _module_and_leaf(name)
      if name.startswith(PROJECTOR):
        projector.setdefault(module.removeprefix(f"{PROJECTOR}/"), {})[leaf] = jnp.asarray(value)
      else:
        part, leaf = (lora, leaf.removeprefix("lora_")) if leaf.startswith("lora_") else (cross, leaf)
        part.setdefault(module, {})[leaf] = jnp.asarray(value)
    return cls(projector, lora, cross)


def rounded(matrix: Float[np.ndarray, "m n"]) -> tuple[Int8[np.ndarray, "m n"], Float[np.ndarray, "..."]]:
  """A matrix in whole numbers of six bits, and the scale of each row, or of each column if these are longer."""
  scale = np.abs(matrix).max(axis=int(matrix.shape[0] < matrix.shape[1]), keepdims=True) / LEVELS
  scale = np.where(scale == 0, np.float32(1), scale)
  return np.rint(matrix / scale).astype(np.int8), scale


def checkpoint_name(module: str) -> str:
  """The name in the checkpoint of the module at a path."""
  return module.replace("/", ".").replace("layers_", "layers.")


def _module_and_leaf(name: str) -> tuple[str, str]:
  """The path of a module and the name of its parameter, from a name of the checkpoint."""
  module, _, leaf = name.replace("layers.", "layers_").replace(".", "/").rpartition("/")
  return module, leaf


def widen(projector: Weights, num_features: int) -> Weights:
  """A projector of the first features that reads more of them, at first with weights of zero."""
  missing = num_features - projector["linear_1"]["weight"].shape[1]
  if missing == 0:
    return projector
  weight = jnp.pad(projector["linear_1"]["weight"], ((0, 0), (0, missing)))
  return {**projector, "linear_1": {**projector["linear_1"], "weight": weight}}


def average(adapters: Sequence[Any], shares: Sequence[float]) -> Any:
  """The weighted mean of adapters that lie on one path of training, each initialised from the one before.

  It recovers some of what later training forgot (Wortsman et al., arXiv 2109.01903).
  """
  return jax.tree.map(lambda *leaves: sum(map(operator.mul, shares, leaves)), *adapters)


def init_cross(language_model: dict[str, Any], names: Sequence[str]) -> Weights:
  """The parameters of the decoder under these names of the checkpoint, in float32."""
  cross, flat = {}, traverse_util.flatten_dict({"language_model": language_model}, sep="/")
  for name in names:
    module, leaf = _module_and_leaf(f"language_model.{name}")
    cross.setdefault(module, {})[leaf] = flat[f"{module}/{leaf}"].astype(jnp.float32)
  return cross


def init_lora(
  key: Key[Array, ""], language_model: dict[str, Any], rank: int, *, without: Collection[str] = ()
) -> Weights:
  """Initial updates of the decoder's linear layers but those at the paths `without`; `b` is zero."""
  lora = {}
  for path, weight in sorted(traverse_util.flatten_dict({"language_model": language_model}).items()):
    module = "/".join(path[:-1])
    if path[-2].endswith("_proj") and path[-1] == "weight" and module not in without:
      key, subkey = jax.random.split(key)
      out_features, in_features = weight.shape
      a = jax.random.normal(subkey, (rank, in_features)) * in_features**-0.5
      lora[module] = {"a": a, "b": jnp.zeros((out_features, rank))}
  return lora


def _apply_lora(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
  """Calls a module's method, and adds the module's low-rank update if it has one."""
  y, module = call(*args, **kwargs), context.module
  if not module.has_variable("lora", "a"):
    return y
  a, b = (module.get_variable("lora", leaf) for leaf in ("a", "b"))
  return y + LORA_SCALE * matmul(matmul(args[0], a, module.kernels), b, module.kernels)


def answer_logits(model: Model, lora: Weights, batch: Batch) -> Float[Array, "B A V"]:
  """Logits of every answer token, given the tokens before it."""
  with nn.intercept_methods(_apply_lora):
    updates = traverse_util.unflatten_dict(lora, sep="/")
    network = model.network.bind({"params": model.params, "lora": updates})
    embedded = network.embed(batch.inputs)
    layers = range(model.config.text.num_hidden_layers)
    x, _ = network.language_model(embedded.x, embedded.positions, layers, layout=embedded.layout, mask=batch.mask())
    return network.logits(take_slots(x, batch.answer_slots))


@dataclasses.dataclass(frozen=True)
class Whitening:
  """An affine map of tower features to zero mean and about unit covariance; the matrix is symmetric."""

  mean: Float[Array, "F"]
  matrix: Float[Array, "F F"]

  @classmethod
  def measure(cls, features: Float[np.ndarray, "P F"]) -> Self:
    """Estimates the map; variances below `WHITENING_FLOOR` are not amplified further."""
    features = features.astype(np.float64)
    variances, axes = np.linalg.eigh(np.cov(features.T))
    matrix = (axes / np.sqrt(variances + WHITENING_FLOOR)) @ axes.T
    return cls(jnp.asarray(features.mean(0), jnp.float32), jnp.asarray(matrix, jnp.float32))

  def __call__(self, features: Float[np.ndarray, "P F"]) -> Float[np.ndarray, "P F"]:
    return (features - np.asarray(self.mean)) @ np.asarray(self.matrix)

  def fold(self, projector: Weights) -> Weights:
    """Converts a projector of whitened features to one of features."""
    weight = projector["linear_1"]["weight"] @ self.matrix
    bias = projector["linear_1"]["bias"] - weight @ self.mean
    return {**projector, "linear_1": {"weight": weight, "bias": bias}}

  def unfold(self, projector: Weights) -> Weights:
    """The inverse of `fold`."""
    weight, bias = projector["linear_1"]["weight"], projector["linear_1"]["bias"]
    whitened = jnp.linalg.solve(self.matrix, weight.T).T
    return {**projector, "linear_1": {"weight": whitened, "bias": bias + weight @ self.mean}}


def init_projector(key: Key[Array, ""], params: Any) -> Weights:
  """A projector of whitened features whose image tokens are initially as large as the text's embeddings."""
  size = jnp.sqrt(jnp.mean(jnp.square(params["language_model"]["embed_tokens"]["weight"])))
  projector = {}
  for subkey, (layer, own) in zip(jax.random.split(key), sorted(params[PROJECTOR].items()), strict=True):
    outputs, inputs = own["weight"].shape
    weight = jax.random.normal(subkey, (outputs, inputs))
    weight = weight * inputs**-0.5 if layer == "linear_1" else weight * 1.5 * size * inputs**-0.5
    projector[layer] = {"weight": weight, "bias": jnp.zeros(outputs)}
  return projector
