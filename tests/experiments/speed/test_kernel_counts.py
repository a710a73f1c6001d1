"""Kernels of a program: of a text by hand, of a compiled loop, and of a prefill, for which the CPU stands in for a GPU."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from test_speed import TINY

from experiments.shared import compiler_report, geometries, planned
from experiments.speed import kernels
from himap_jax.engine import sharding
from himap_jax.errors import UserError

HLO = """
%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %p = (s32[], f32[2]{0}) parameter(0)
  %fusion.1 = f32[2]{0} fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/inside"}
  ROOT %tuple.1 = (s32[], f32[2]{0}) tuple(%p, %fusion.1)
}

%called (p: f32[2]) -> f32[2] {
  ROOT %custom.1 = f32[2]{0} custom-call(%p), custom_call_target="sort", metadata={op_name="jit(f)/choose"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %while.1 = (s32[], /*index=1*/f32[2]{0}) while(%x), condition=%c, body=%body, metadata={op_name="jit(f)/loop"}, backend_config={"known_trip_count":{"n":"5"}}
  %get.1 = f32[2]{0} get-tuple-element(%while.1), index=1
  %start.1 = f32[2]{0} all-reduce-start(%get.1), metadata={op_name="jit(f)/choose"}
  %done.1 = f32[2]{0} all-reduce-done(%start.1), metadata={op_name="jit(f)/choose"}
  ROOT %call.1 = f32[2]{0} call(%done.1), to_apply=%called
}
"""


def test_loops_count_as_often_as_they_run():
  found = compiler_report.count_kernels(types.SimpleNamespace(as_text=lambda: HLO))
  assert found.kernels == {"jit(f)/loop": 5, "jit(f)/choose": 2}
  assert found.passes == {"jit(f)/loop": 5}


def test_a_compiled_loop():
  def products(x):
    with jax.named_scope("products"):
      return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x @ x), x)

  found = compiler_report.count_kernels(jax.jit(products).lower(jnp.ones((256, 256))).compile())
  ((scope, passes),) = found.passes.items()
  assert "products" in scope and passes == 7
  assert found.kernels[scope] >= 2 * 7


def test_a_prefill(monkeypatch):
  monkeypatch.setitem(geometries.GEOMETRIES, "tiny", TINY)
  mesh = sharding.make_mesh()
  none, himap = (list(kernels.count(mesh, "tiny", method, 2, 16)) for method in ("none", "himap"))
  assert none[:2] == ["none", "2"] and none[3:5] == ["0", "0"]
  assert himap[:2] == ["himap", "2"] and int(himap[3]) > int(himap[4]) > 0


def test_what_takes_a_gpu_to_be_lowered(monkeypatch):
  def lower(*arguments, **options):
    raise NotImplementedError("heads of 256")

  monkeypatch.setitem(geometries.GEOMETRIES, "tiny", TINY)
  monkeypatch.setattr(kernels.programs.Programs, "lower", lower)
  with pytest.raises(UserError, match="^tiny cannot be lowered without a GPU: heads of 256$"):
    kernels.count(sharding.make_mesh(), "tiny", "none", 2, 16)


def test_without_the_plugin(monkeypatch):
  def not_installed(**options):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topologies, "get_topology_desc", not_installed)
  planned.gpus.cache_clear()
  with pytest.raises(UserError, match=r"not implemented for cuda; it needs pip install -e '\.\[cuda\]'$"):
    planned.gpus(1)
