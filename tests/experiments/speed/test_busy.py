"""How busy a device is, by a trace: spans by hand, and a trace of programs with pauses between them; and steps of rungs."""

import time

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from experiments.speed import busy, rungs
from experiments.speed.busy import Span
from himap_jax.engine.engine import TURN


def test_spans_that_overlap_count_once():
  own = [Span(6e9, 7e9), Span(0, 2e9), Span(1e9, 4e9), Span(3e9, 3.5e9)]
  assert busy.busy_seconds(own, 1e9) == (4, 6)
  assert busy.busy_seconds(own, 0) == (5, 7)


@pytest.mark.sampled(of="commands of studies")
def test_a_trace_says_when_programs_ran(tmp_path):
  def long(x):
    return jax.lax.fori_loop(0, 400, lambda _, x: jnp.tanh(x @ x), x)

  program, x = jax.jit(long), jnp.ones((256, 256))
  jax.block_until_ready(program(x))
  with jax.profiler.trace(tmp_path):
    for _ in range(4):
      with jax.profiler.TraceAnnotation(TURN):
        jax.block_until_ready(program(x))
      time.sleep(0.05)
  (trace,) = tmp_path.rglob("*.xplane.pb")
  programs, first = busy.spans(ProfileData.from_file(str(trace)))
  ((device, own),) = programs.items()
  used, seconds = busy.busy_seconds(own, first)
  assert device == "cpu" and len(own) >= 4
  assert 0 < used < seconds - 3 * 0.05  # three pauses follow the first turn, and a program the last


@pytest.mark.sampled(of="commands of studies")
def test_steps_of_a_rung_are_timed(loaded, images):
  make = rungs.steps(loaded("clip_mha"), images[0], num_new=4, prune_layers=(2, 4))
  for rung, slots in ((0, 1), (2, 3)):
    assert 0 < make(rung, slots)() < 60
