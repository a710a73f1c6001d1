"""TEMPORARY stand-in (being replaced by the checkpoints engineer)."""
import dataclasses, json, os, pathlib
from typing import Any
import jax, numpy as np
from jaxtyping import PyTree
from himap_jax import families
from himap_jax.engine import sharding
from himap_jax.model.network import Model, Network, abstract_params, logical_axes

def _tree_path(name):
  import types
  if "old_names" in __import__("sys").modules: return __import__("sys").modules["old_names"].tree_path(name)
  text = pathlib.Path("/work/scratch/old/checkpoints_convert/names.py").read_text().replace("from himap_jax.config import LlavaConfig", "LlavaConfig = object")
  module = types.ModuleType("old_names"); import sys; sys.modules["old_names"] = module
  exec(compile(text, "names.py", "exec"), module.__dict__)
  return module.tree_path(name)

def default_cache_dir():
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(os.environ.get("HIMAP_JAX_CACHE") or pathlib.Path(base) / "himap_jax").expanduser()

@dataclasses.dataclass(frozen=True)
class LoadedModel:
  model: Model
  family: Any
  processor: Any
  directory: pathlib.Path
  eos_token_ids: tuple
  fingerprint: str = "temporary"
  @property
  def config(self): return self.model.config
  @property
  def dtype(self): return self.model.dtype
  def prompts(self, template="chat"): return self.family.processor(self.processor, self.config, template)
  def schedule(self, method, prune_layers=None, keep=None, parameters=None):
    from himap_jax.pruning.methods import build_schedule
    return build_schedule(method, num_layers=self.config.text.num_hidden_layers, num_image_tokens=self.prompts("<image>{question}").num_image_tokens, has_class_token=self.config.vision.has_class_token, prune_layers=prune_layers, keep=keep, parameters=parameters)

@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
  config: Any
  family: Any
  processor: Any
  directory: pathlib.Path
  eos_token_ids: tuple
  def prompts(self, template="chat"): return self.family.processor(self.processor, self.config, template)
  def digest(self): return "temporary"
  def num_bytes(self, dtype, int8_weights=False):
    return sum(int(np.prod(l.shape)) * l.dtype.itemsize for l in jax.tree.leaves(abstract_params(self.config, dtype)))
  def restore(self, *, dtype, mesh=None, int8_weights=False):
    import safetensors.torch
    mesh = sharding.make_mesh() if mesh is None else mesh
    flat = {}
    for f in sorted(self.directory.glob("*.safetensors")):
      for k, v in safetensors.torch.load_file(f).items(): flat[_tree_path(k)] = v
    targets = sharding.placed(abstract_params(self.config, dtype), logical_axes(self.config), self.config, mesh)
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(flat[tuple(p.key for p in path)].float().numpy().astype(dtype), leaf.sharding), targets)
    params = sharding.repeat_key_heads(params, self.config, mesh)
    config = sharding.with_divisible_key_heads(self.config, mesh)
    return LoadedModel(Model(params, Network(config, dtype, sharding.kernels_for(mesh))), self.family, self.processor, self.directory, self.eos_token_ids)

def open_checkpoint(name, *, cache_dir=None):
  d = pathlib.Path(name if name != "demo" else "/work/scratch/cache_old/demo")
  fields = json.loads((d / "config.json").read_text()); family = families.family_of(fields)
  processor = family.load_processor(d)
  e = json.loads((d / "generation_config.json").read_text()).get("eos_token_id", processor.tokenizer.eos_token_id)
  return OpenCheckpoint(family.config(fields, str(d)), family, processor, d, tuple(e) if isinstance(e, list) else (e,))

def load(name, *, dtype, cache_dir=None, mesh=None): return open_checkpoint(name, cache_dir=cache_dir).restore(dtype=dtype, mesh=mesh)
