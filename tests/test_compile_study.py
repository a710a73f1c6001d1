"""The variants of a prefill that the study of static shapes compares are the same prefill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

from experiments.compile_study import variants
from experiments.compile_study.recorder import Recorder
from experiments.compile_study.variants import VARIANTS
from himap_jax.llava import Inputs, Llava
from himap_jax.methods import build_schedule

PROMPTS = ("<s><image>Where?", "<s>USER: <image>\nWhat is it? ASSISTANT:")
SAME = [name for name in VARIANTS if name not in ("dynamic", "exact_length")]


@pytest.fixture(scope="module")
def prefill(checkpoints, loaded, images):
  """Returns `prefill(name)`: the logits of a variant for two rows, and its recorder."""
  tiny, model = checkpoints("clip_mha"), loaded("clip_mha")
  rows = [tiny.encode(image, prompt) for image, prompt in zip(images[:2], PROMPTS, strict=True)]
  inputs = Inputs(**jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, 72)))
  schedule = build_schedule("himap", num_layers=6, num_image_tokens=16, prune_layers=(2, 4), keep=(8, 3))

  def run(name):
    recorder = Recorder()
    call = VARIANTS[name].build(recorder, Llava(model.config, jnp.float32), schedule)
    logits = call(model.params, inputs)
    np.testing.assert_array_equal(call(model.params, inputs), logits)
    return np.asarray(logits), recorder

  return run


@pytest.fixture(scope="module")
def expected(prefill):
  return prefill("gather")[0]


@pytest.mark.parametrize("name", SAME)
def test_gives_the_library_s_logits(name, prefill, expected):
  logits, recorder = prefill(name)
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
  assert len(recorder.compiled) == (7 if name == "by_segment" else 1)
  assert recorder.seconds > 0 and recorder.num_instructions > 100 and recorder.temporaries > 0


def test_dynamic_counts_cover_the_scores(prefill, expected, monkeypatch):
  monkeypatch.setattr(variants, "GRANULE", 4)
  monkeypatch.setattr(variants, "COVERED", 0.999999)
  logits, recorder = prefill("dynamic")
  kept = [program.out_info for program in recorder.compiled]
  assert np.abs(logits - expected).max() > 1e-3
  layouts = [info.layout.num_image_tokens for info in kept if hasattr(info, "layout")]
  assert layouts == sorted(layouts, reverse=True) and all(count % 4 == 0 for count in layouts)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.can_be_abstract])
def test_compiles_from_shapes_alone(name, loaded):
  model = loaded("clip_mha")
  recorder = Recorder(is_abstract=True)
  schedule = build_schedule("himap", num_layers=6, num_image_tokens=16, prune_layers=(2, 4), keep=(8, 3))
  array = jax.ShapeDtypeStruct
  inputs = Inputs(
    array((2, 72), jnp.int32), array((2,), jnp.int32), array((2,), jnp.int32), array((2, 3, 28, 28), jnp.float32)
  )
  params = jax.tree.map(lambda x: array(x.shape, x.dtype), model.params)
  logits = VARIANTS[name].build(recorder, Llava(model.config, jnp.float32), schedule)(params, inputs)
  assert (logits.shape, logits.dtype) == ((2, 272), jnp.float32)
  assert recorder.num_instructions > 100
