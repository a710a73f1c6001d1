"""Int8 weights against NumPy, made while a checkpoint is read or before, and the memory that this takes."""

import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tiny_checkpoints
from layouts import assert_same_trees, convert_to, flat_params

from checkpoints_convert import int8
from checkpoints_convert.errors import CheckpointError
from checkpoints_convert.marker import read_marker
from himap_jax import GenerationConfig, InputConfig, checkpoint, generate
from himap_jax.engine import sharding
from himap_jax.model.kernels import is_quantized
from himap_jax.model.network import abstract_params
from himap_jax.model.quantization import map_int8

pytestmark = pytest.mark.usefixtures("cache")
MESHES = [{"data": 1}, {"data": 2, "tensor": 4}]


@pytest.fixture(scope="module")
def clip(checkpoints):
  return checkpoints("clip_mha").directory


def test_every_number_is_at_the_nearest_step():
  weight = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
  array = int8.quantize(jnp.asarray(weight))
  assert array.qvalue.dtype == jnp.int8
  integers, scale = np.asarray(array.qvalue, np.int64), np.asarray(array.scale, np.float64)
  np.testing.assert_allclose(scale, np.abs(weight).max(axis=1, keepdims=True) / 127.5, rtol=1e-6)
  assert (np.abs(integers * scale - weight) <= 0.5001 * scale).all()


@jax.jit
def quantize(weight):
  return qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))


class TestStreaming:
  @pytest.mark.sampled
  @pytest.mark.parametrize(("name", "dtype"), [("clip_mha", jnp.float32), ("clip_gqa_tied", jnp.bfloat16)])
  @pytest.mark.parametrize("axes", MESHES, ids=str)
  @pytest.mark.parametrize("is_converted", [False, True], ids=["direct", "converted"])
  def test_the_same_as_of_a_model_that_was_read_whole(self, checkpoints, tmp_path, name, dtype, axes, is_converted):
    directory = checkpoints(name).directory
    if is_converted:
      directory = convert_to(directory, tmp_path / "target")
    opened, mesh = checkpoint.open_checkpoint(str(directory)), sharding.make_mesh(**axes)
    whole, eight = (opened.restore(dtype=dtype, mesh=mesh, int8_weights=int8).model.params for int8 in (False, True))
    expected = map_int8(quantize, whole)
    assert jax.tree.structure(eight) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, eight, expected)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), eight, expected))

  def test_what_is_int8(self, clip):
    loaded = checkpoint.open_checkpoint(str(clip)).restore(dtype=jnp.float32, int8_weights=True)
    assert loaded.model.dtype == jnp.float32
    kinds = jax.tree.map(is_quantized, loaded.model.params, is_leaf=is_quantized)
    layer = kinds["language_model"]["layers_0"]
    assert layer["self_attn"]["q_proj"]["weight"] and layer["mlp"]["down_proj"]["weight"] and kinds["lm_head"]["weight"]
    assert sum(jax.tree.leaves(kinds)) == 7 * tiny_checkpoints.LLAMA["num_hidden_layers"] + 1

  @pytest.mark.parametrize("is_converted", [False, True], ids=["direct", "converted"])
  def test_memory(self, clip, tmp_path, monkeypatch, is_converted):
    """At no time is more on the devices than the int8 model and one weight as it is stored."""
    directory = convert_to(clip, tmp_path / "target") if is_converted else clip
    opened = checkpoint.open_checkpoint(str(directory))
    monkeypatch.setattr("checkpoints_convert.weights.READ_BYTES", 0)  # one after another, as large weights are
    before, seen = live_bytes(), []
    quantize = int8.quantize

    def watched(weight):
      result = quantize(weight)
      seen.append((live_bytes() - before, weight.nbytes))
      return result

    monkeypatch.setattr(int8, "quantize", watched)
    loaded = opened.restore(dtype=jnp.bfloat16, int8_weights=True)
    num_bytes, full = opened.num_bytes(jnp.bfloat16, int8_weights=True), opened.num_bytes(jnp.bfloat16)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.model.params)) == num_bytes
    assert len(seen) == 43
    assert max(held for held, _ in seen) <= num_bytes + max(one for _, one in seen) < full

  def test_bytes(self, checkpoints, clip):
    for name in ("clip_mha", "clip_gqa_tied"):
      opened = checkpoint.open_checkpoint(str(checkpoints(name).directory))
      for is_int8 in (False, True):
        params = opened.restore(dtype=jnp.bfloat16, int8_weights=is_int8).model.params
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert opened.num_bytes(jnp.bfloat16, int8_weights=is_int8) == num_bytes


def live_bytes():
  return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture(scope="module")
def target(checkpoints, cache, tmp_path_factory):
  """Returns `target(name)`: a checkpoint that was converted with int8 weights."""
  folder = tmp_path_factory.mktemp("int8")
  return lambda name: convert_to(checkpoints(name).directory, folder / name, int8_weights=True)


class TestConverted:
  @pytest.mark.sampled
  @pytest.mark.parametrize("name", ["clip_mha", "clip_gqa_tied"])
  @pytest.mark.parametrize("axes", MESHES, ids=str)
  def test_loads_as_what_it_was_made_from(self, checkpoints, target, name, axes):
    mesh = sharding.make_mesh(**axes)
    expected = flat_params(checkpoints(name).directory, mesh=mesh, int8_weights=True)
    found = flat_params(target(name), mesh=mesh, int8_weights=True)
    assert_same_leaves(found, expected)

  def test_its_marker_and_its_size(self, clip, target):
    directory = target("clip_mha")
    assert read_marker(directory)["int8_weights"] and not (directory / "model.safetensors").exists()
    size = sum(path.stat().st_size for path in (directory / "params").rglob("*") if path.is_file())
    assert size < 0.75 * (clip / "model.safetensors").stat().st_size  # the tower and the embedding are float32
    plain, eight = (checkpoint.open_checkpoint(str(one)) for one in (clip, directory))
    assert eight.weights.marker["fingerprint"] == f"{plain.digest()}-int8"

  def test_other_leaves_have_the_wanted_dtype(self, target):
    found = flat_params(target("clip_mha"), jnp.bfloat16, int8_weights=True)
    dtypes = {(is_quantized(leaf), jnp.dtype(leaf.dtype).name) for leaf in found.values()}
    assert dtypes == {(False, "bfloat16"), (True, "float32")}

  def test_is_not_loaded_as_something_else(self, target):
    opened = checkpoint.open_checkpoint(str(target("clip_mha")))
    with pytest.raises(CheckpointError, match="its decoder weights are int8; load it with --int8_weights"):
      opened.restore(dtype=jnp.float32)

  def test_is_not_taken_for_the_plain_conversion(self, clip, target):
    with pytest.raises(CheckpointError, match="was not converted from this source"):
      convert_to(clip, target("clip_mha"))
    assert convert_to(clip, target("clip_mha"), int8_weights=True) == target("clip_mha")

  def test_command(self, clip, tmp_path):
    paths = f"--source={clip}", f"--target={tmp_path / 'target'}"
    commands.Command("himap_jax.convert", *paths, "--int8_weights").succeeded()
    assert_same_leaves(flat_params(tmp_path / "target", int8_weights=True), flat_params(clip, int8_weights=True))


def assert_same_leaves(found, expected):
  assert found.keys() == expected.keys()
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  parts = lambda tree: {str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}  # noqa: E731
  assert_same_trees(parts(found), parts(expected))


def test_shapes_alone_are_those_of_the_real_ones(clip):
  mesh = sharding.make_mesh(data=2, tensor=4)
  opened = checkpoint.open_checkpoint(str(clip))
  real = opened.restore(dtype=jnp.bfloat16, mesh=mesh, int8_weights=True).model.params
  abstract = map_int8(int8.abstract_int8, abstract_params(opened.config, jnp.bfloat16))
  assert jax.tree.structure(abstract) == jax.tree.structure(real)
  assert jax.tree.all(jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), abstract, real))
  weight = real["language_model"]["layers_1"]["mlp"]["up_proj"]["weight"]
  leaf = jax.ShapeDtypeStruct(weight.shape, jnp.bfloat16, sharding=weight.qvalue.sharding)
  placed = int8.abstract_int8(leaf)
  for part in ("qvalue", "scale"):
    assert getattr(placed, part).sharding.is_equivalent_to(getattr(weight, part).sharding, 2), part


def test_without_qwix(clip, monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  opened = checkpoint.open_checkpoint(str(clip))
  with pytest.raises(CheckpointError, match=r"need qwix: pip install -e '\.\[int8\]'"):
    opened.num_bytes(jnp.float32, int8_weights=True)


def test_a_model_answers_nearly_the_same(clip, images):
  opened = checkpoint.open_checkpoint(str(clip))
  models = [opened.restore(dtype=jnp.float32, int8_weights=int8) for int8 in (False, True)]
  options = dict(
    schedule=models[0].schedule("himap", (2, 4), (8, 3)),
    generation=GenerationConfig(4, ignore_eos=True),
    inputs=InputConfig(prompt_buckets=(64,), batch_size=2),
  )
  answers = [generate(model, images[:2], ["What is it?", "Why?"], **options) for model in models]
  for exact, rounded in zip(*answers, strict=True):
    assert len(rounded.token_ids) == 4
    correlation = np.corrcoef(exact.first_logits, rounded.first_logits)[0, 1]
    assert 0.95 < correlation < 1 - 1e-7
