"""Phi-3's fused tensors: their parts in every layout of names, converted, sharded and as int8; and unfit shapes."""

import numpy as np
import pytest
from layouts import WEIGHTS, assert_same_trees, convert_to, copy_of, flat_params, newer_name, refuses
from safetensors.numpy import load_file

from checkpoints_convert.transforms import UnfitShape, split_rows
from himap_jax.engine import sharding

LAYER = "language_model.model.layers.1."


@pytest.fixture(scope="module")
def phi3(checkpoints):
  return checkpoints("phi3").directory


@pytest.fixture(scope="module")
def params(phi3):
  return flat_params(phi3)


def test_parts_are_the_rows_that_transformers_reads(checkpoints, phi3, params):
  """4 query heads and 2 key heads of 12 features; 96 rows of gate, then of up."""
  stored = load_file(phi3 / WEIGHTS)
  query, key, value = np.split(stored[LAYER + "self_attn.qkv_proj.weight"], [48, 72])
  gate, up = np.split(stored[LAYER + "mlp.gate_up_proj.weight"], 2)
  parts = {"self_attn/q_proj": query, "self_attn/k_proj": key, "self_attn/v_proj": value}
  for name, expected in (parts | {"mlp/gate_proj": gate, "mlp/up_proj": up}).items():
    np.testing.assert_array_equal(params[f"language_model/layers_1/{name}/weight"], expected)


def original_name(name):
  """That of LLaVA's original layout, for the decoder."""
  return name.removeprefix("language_model.") if ".model." in name else name


@pytest.mark.parametrize("rename", [newer_name, original_name])
def test_every_layout_of_names(phi3, params, tmp_path, rename):
  assert_same_trees(flat_params(copy_of(phi3, tmp_path / "source", rename=rename)), params)


def test_converted_and_sharded(phi3, params, tmp_path):
  assert_same_trees(flat_params(convert_to(phi3, tmp_path / "target")), params)
  assert_same_trees(flat_params(phi3, mesh=sharding.make_mesh(data=4, tensor=2)), params)


def test_int8(phi3, params):
  path = "language_model/layers_1/self_attn/k_proj/weight"
  weight = flat_params(phi3, int8_weights=True)[path]
  np.testing.assert_allclose(np.asarray(weight.qvalue) * np.asarray(weight.scale), params[path], atol=0.02)


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("self_attn.qkv_proj", lambda x: np.concatenate([x, x[:4]]), r"is \[100, 48\], expected \[96, 48\]"),
    ("mlp.gate_up_proj", lambda x: x[:-1], r"is \[191, 48\], expected \[192, 48\]"),
    ("mlp.gate_up_proj", lambda x: x[:, :-1], r"is \[192, 47\], read as \[96, 47\], expected \[96, 48\]"),
  ],
)
def test_an_unfit_shape_is_one_clear_line(phi3, tmp_path, name, change, message):
  name = f"{LAYER}{name}.weight"
  directory = copy_of(phi3, tmp_path / "source", change=lambda stored: stored | {name: change(stored[name]).copy()})
  refuses(directory, tmp_path / "target", rf"1 mis-shaped \({name} {message}\); ")


def test_a_fused_bias_is_split_too():
  assert [part.tolist() for part in split_rows(np.arange(5), (1, 2, 2))] == [[0], [1, 2], [3, 4]]
  with pytest.raises(UnfitShape, match=r"expected \[5\]"):
    split_rows(np.arange(6), (1, 2, 2))
