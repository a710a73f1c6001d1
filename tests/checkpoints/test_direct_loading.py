"""Checkpoints in the Hugging Face layout are read as they are: the same numbers, each device its part, little memory."""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from layouts import WEIGHTS, assert_same_trees, convert_to, copy_of, flat_params, newer_name, shard, tree_path
from peak_memory import WATCHED, widen
from safetensors.numpy import load_file, save_file

from checkpoints_convert import names
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.names import Entry
from checkpoints_convert.stored import StoredTensor
from himap_jax import checkpoint
from himap_jax.engine import sharding

pytestmark = pytest.mark.usefixtures("cache")
ROOT = pathlib.Path(__file__).parents[2]
KINDS = ["clip_mha", "clip_gqa_tied", "siglip", "dinov2", "dinov2_shrunk"]


@pytest.fixture(scope="module")
def clip(checkpoints):
  return checkpoints("clip_mha").directory


class TestNumbers:
  @pytest.mark.parametrize("name", KINDS)
  def test_parameters_are_those_that_transformers_saved(self, checkpoints, name):
    directory = checkpoints(name).directory
    expected = {tree_path(key): value for key, value in load_file(directory / WEIGHTS).items()}
    found = flat_params(directory)
    assert len(found) > 50
    for path, leaf in found.items():
      np.testing.assert_array_equal(np.asarray(leaf), expected[path], err_msg=path)

  @pytest.mark.sampled
  @pytest.mark.parametrize("name", KINDS)
  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
  def test_a_converted_copy_gives_the_same(self, checkpoints, tmp_path, name, dtype):
    directory = checkpoints(name).directory
    target = convert_to(directory, tmp_path / "target")
    assert_same_trees(flat_params(directory, dtype), flat_params(target, dtype))

  @pytest.mark.sampled
  @pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
  @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
  def test_stored_dtypes(self, clip, tmp_path, stored, dtype):
    cast = lambda tensors: {name: value.astype(stored) for name, value in tensors.items()}  # noqa: E731
    directory = copy_of(clip, tmp_path / "source", change=cast)
    expected = {path: leaf.astype(stored).astype(dtype) for path, leaf in flat_params(clip).items()}
    loaded = flat_params(directory, dtype)
    assert {leaf.dtype for leaf in loaded.values()} == {jnp.dtype(dtype)}
    assert_same_trees(loaded, expected)

  def test_shards_and_newer_names(self, clip, tmp_path):
    directory = shard(copy_of(clip, tmp_path / "source", rename=newer_name))
    assert_same_trees(flat_params(directory), flat_params(clip))

  def test_nothing_is_written(self, clip, tmp_path):
    checkpoint.load(str(clip), dtype=jnp.float32, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_transforms(clip, tmp_path, monkeypatch):
  """A tensor that is stored transposed, and one that holds three parameters, of which every device reads its part."""
  whole = flat_params(clip)

  def store(tensors):
    stored = {}
    for name, value in tensors.items():
      if name.endswith("mlp.up_proj.weight"):
        stored[name] = np.ascontiguousarray(value.T)
      elif name.startswith("language_model") and name.endswith("q_proj.weight"):
        parts = [tensors[name.replace("q_proj", kind)] for kind in ("q_proj", "k_proj", "v_proj")]
        stored[name.replace("q_proj", "qkv")] = np.concatenate(parts)
      elif not name.startswith("language_model") or not name.endswith(("k_proj.weight", "v_proj.weight")):
        stored[name] = value
    return stored

  layer, place = r"language_model\.model\.layers\.(\d+)\.", r"language_model.layers.\1."
  entries = [Entry(layer + r"mlp\.up_proj\.", place + "mlp.up_proj.", lambda x, fields: x.T)]
  for number, kind in enumerate(("q_proj", "k_proj", "v_proj")):
    rows = lambda x, fields, number=number: np.split(x, 3)[number]  # noqa: E731
    entries.append(Entry(layer + r"self_attn\.qkv\.", f"{place}self_attn.{kind}.", rows))
  table = names.TABLES["llava"]
  monkeypatch.setitem(names.TABLES, "llava", table._replace(entries=(*entries, *table.entries)))
  directory = copy_of(clip, tmp_path / "source", change=store)
  assert_same_trees(flat_params(directory), whole)
  assert_same_trees(flat_params(directory, mesh=sharding.make_mesh(data=2, tensor=4)), whole)
  assert_same_trees(flat_params(convert_to(directory, tmp_path / "target")), whole)
  with pytest.raises(CheckpointError, match=r"up_proj.weight is \[96, 48\], read as \[48, 96\], expected \[96, 48\]"):
    flat_params(clip)


@dataclasses.dataclass
class Reads:
  """What was read of which tensor."""

  parts: list

  def of(self, ending):
    return [part for name, part in self.parts if name.endswith(ending)]


@pytest.fixture
def reads(monkeypatch):
  found = Reads([])
  reader = StoredTensor.reader

  def recorded(tensor):
    read = reader(tensor)

    def record(index):
      part = read(index)
      found.parts.append((tensor.name, part))
      return part

    return record

  monkeypatch.setattr(StoredTensor, "reader", recorded)
  return found


class TestMeshes:
  def test_each_device_has_its_part(self, clip):
    mesh = sharding.make_mesh(data=2, tensor=4)
    tensors = {tree_path(name): value for name, value in load_file(clip / WEIGHTS).items()}
    loaded = flat_params(clip, mesh=mesh)
    divided = 0
    for path, leaf in loaded.items():
      assert len(leaf.addressable_shards) == 8
      divided += not leaf.is_fully_replicated
      for part in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(part.data), tensors[path][part.index], err_msg=path)
    assert divided > 6 * 7

  def test_a_part_is_read_once_and_nothing_else_is(self, clip, reads):
    mesh = sharding.make_mesh(data=2, tensor=4)
    loaded = flat_params(clip, mesh=mesh)
    assert [part.shape for part in reads.of("layers.1.mlp.down_proj.weight")] == [(48, 24)] * 4
    assert [part.shape for part in reads.of("layers.1.mlp.up_proj.weight")] == [(24, 48)] * 4
    assert [part.shape for part in reads.of("language_model.model.norm.weight")] == [(48,)]
    assert sum(part.size for _, part in reads.parts) == sum(leaf.size for leaf in loaded.values())

  def test_key_heads_are_repeated(self, checkpoints):
    directory = checkpoints("clip_gqa_tied").directory
    few, many = flat_params(directory), flat_params(directory, mesh=sharding.make_mesh(data=2, tensor=4))
    for kind in ("k_proj/weight", "v_proj/bias"):
      path = f"language_model/layers_1/self_attn/{kind}"
      heads = np.split(np.asarray(few[path]), 2)
      np.testing.assert_array_equal(np.asarray(many[path]), np.concatenate([heads[h] for h in (0, 0, 1, 1)]))
      assert many[path].addressable_shards[0].data.shape[0] == 12


MEASURED = f"""{WATCHED}
import sys
import jax, jax.numpy as jnp
from himap_jax import checkpoint
jax.block_until_ready(jnp.zeros(3))
opened = checkpoint.open_checkpoint(sys.argv[1])
before = start()
params = opened.restore(dtype=jnp.bfloat16).model.params
leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
print(peak[0] - before - sum(leaves), max(leaves))
"""


@pytest.mark.sampled(of="memory")
def test_memory_beside_the_parameters_is_one_of_them(clip, tmp_path):
  """Two layers of 4 x 4 MB and 3 x 25 MB, stored in float32 and wanted in bfloat16."""
  directory = tmp_path / "source"
  shapes = widen(clip, directory, num_layers=2)
  save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, directory / WEIGHTS)
  result = subprocess.run(
    [sys.executable, "-c", MEASURED, str(directory)], capture_output=True, text=True, cwd=ROOT, check=True
  )
  extra, largest = map(int, result.stdout.split())
  assert extra < 3 * largest + (20 << 20)  # in float32, and in bfloat16


class TestHub:
  @pytest.fixture
  def hub(self, clip, tmp_path, monkeypatch):
    """The hub's own cache with one model: snapshots of links to blobs."""
    repository = tmp_path / "hub" / "models--owner--tiny-llava"
    snapshot = repository / "snapshots" / ("0" * 39 + "1")
    for folder in (snapshot, repository / "blobs", repository / "refs"):
      folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, path in enumerate(sorted(clip.iterdir())):
      blob = repository / "blobs" / f"{number:064x}"
      shutil.copy(path, blob)
      (snapshot / path.name).symlink_to(pathlib.Path("../../blobs", blob.name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    return snapshot

  def test_a_model_in_the_hubs_cache_is_read_where_it_lies(self, hub, clip, tmp_path):
    opened = checkpoint.open_checkpoint("owner/tiny-llava", cache_dir=tmp_path / "cache")
    assert opened.directory == hub
    loaded = traverse_util.flatten_dict(opened.restore(dtype=jnp.float32).model.params, sep="/")
    assert_same_trees(loaded, flat_params(clip))
    assert opened.digest() == checkpoint.open_checkpoint(str(clip), cache_dir=tmp_path / "cache").digest()

  def test_a_blob_that_was_not_fetched(self, hub, tmp_path):
    (hub / WEIGHTS).resolve().unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read .*No such file"):
      checkpoint.open_checkpoint("owner/tiny-llava", cache_dir=tmp_path / "cache")

  def test_a_model_that_is_not_there(self, hub, tmp_path):
    with pytest.raises(CheckpointError, match="owner/other: no such directory, and it cannot be downloaded"):
      checkpoint.open_checkpoint("owner/other", cache_dir=tmp_path / "cache")


UNNEEDED = """
import sys
import jax.numpy as jnp
from himap_jax import checkpoint
checkpoint.load(sys.argv[1], dtype=jnp.float32)
print(sorted(name for name in ("qwix", "onnx", "gguf", "torch", "matplotlib") if sys.modules.get(name)))
"""


def test_what_a_run_does_not_need_is_not_imported(clip):
  result = subprocess.run([sys.executable, "-c", UNNEEDED, str(clip)], capture_output=True, text=True, cwd=ROOT)
  assert result.returncode == 0, result.stderr
  assert result.stdout == "[]\n"
