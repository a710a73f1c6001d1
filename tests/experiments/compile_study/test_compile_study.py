"""The study of static shapes: its variants are the same prefill, its workload is all there, its figures are what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints

from experiments.compile_study import answering, measure, report, variants
from experiments.compile_study.measure import Setting
from experiments.compile_study.recorder import Recorder
from experiments.compile_study.variants import VARIANTS
from experiments.shared.lengths import draw_lengths
from experiments.shared.subject import Subject
from himap_jax.engine import sharding
from himap_jax.generation import InputConfig
from himap_jax.inputs import Images, Inputs, Layout
from himap_jax.model.network import Model, Network, abstract_params, logical_axes
from himap_jax.pruning.config import build_schedule

pytestmark = pytest.mark.sampled(of="files of studies", by="file")

PROMPTS = ("<s><image>Where?", "<s>USER: <image>\nWhat is it? ASSISTANT:")
SAME = [name for name in VARIANTS if name not in ("dynamic", "exact_length")]


@pytest.fixture(scope="module")
def prefill(checkpoints, loaded, images):
  """Returns `prefill(name)`: the logits of a variant for two rows, and its recorder."""
  tiny, own = checkpoints("clip_mha"), loaded("clip_mha")
  model = Model(own.model.params, Network(own.config, jnp.float32))
  rows = [tiny.encode(image, prompt) for image, prompt in zip(images[:2], PROMPTS, strict=True)]
  inputs = jax.tree.map(jnp.asarray, tiny_checkpoints.pad_batch(rows, 72))
  schedule = build_schedule("himap", num_layers=6, num_image_tokens=16, prune_layers=(2, 4), keep=(8, 3))

  def run(name):
    recorder = Recorder()
    call = VARIANTS[name].build(recorder, schedule)
    logits = call(model, inputs)
    np.testing.assert_array_equal(call(model, inputs), logits)
    return np.asarray(logits), recorder

  return run


@pytest.fixture(scope="module")
def expected(prefill):
  return prefill("gather")[0]


@pytest.mark.sampled
@pytest.mark.parametrize("name", SAME)
def test_gives_the_library_s_logits(name, prefill, expected):
  logits, recorder = prefill(name)
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
  assert len(recorder.compiled) == (7 if name == "by_segment" else 1)
  account = recorder.account()
  assert recorder.seconds > 0 and account["instructions"] > 100 and account["temporaries"] > 0


def test_dynamic_counts_cover_the_scores(prefill, expected, monkeypatch):
  monkeypatch.setattr(variants, "GRANULE", 4)
  monkeypatch.setattr(variants, "COVERED", 0.999999)
  logits, recorder = prefill("dynamic")
  kept = [program.out_info for program in recorder.compiled]
  assert np.abs(logits - expected).max() > 1e-3
  layouts = [info.layout.num_image_tokens for info in kept if hasattr(info, "layout")]
  assert layouts == sorted(layouts, reverse=True) and all(count % 4 == 0 for count in layouts)


@pytest.mark.sampled
@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.can_be_abstract])
def test_compiles_from_shapes_alone(name, loaded):
  config = loaded("clip_mha").config
  recorder = Recorder(is_abstract=True)
  schedule = build_schedule("himap", num_layers=6, num_image_tokens=16, prune_layers=(2, 4), keep=(8, 3))
  slots = jax.ShapeDtypeStruct((2, 72), jnp.int32)
  layout = Layout(slots, slots, slots, slots, slots.update(dtype=bool), 16)
  inputs = Inputs(slots, layout, slots, Images(jax.ShapeDtypeStruct((2, 1, 3, 28, 28), jnp.float32)))
  mesh = sharding.make_mesh(4, 2)
  params = sharding.placed(abstract_params(config, jnp.float32), logical_axes(config), config, mesh)
  logits = VARIANTS[name].build(recorder, schedule)(Model(params, Network(config, jnp.float32)), inputs)
  assert (logits.shape, logits.dtype) == ((2, 272), jnp.float32)
  assert recorder.account()["instructions"] > 100


@pytest.mark.parametrize("is_bucketed", [True, False])
def test_the_workload_s_batches(is_bucketed, loaded, monkeypatch):
  monkeypatch.setattr(measure, "MOST_QUESTIONS", 6)  # the tiny model's context is short
  inputs = InputConfig("<image>{question}", (64, 128, 256), 3)
  prompts = measure.workload(40, seed=3)
  assert prompts == measure.workload(40, seed=3)
  subject = Subject.load(loaded("clip_mha"), prompts, inputs=inputs)
  examples = {question.id: example for question, example, _ in subject.examples("prompts")}
  lengths = [example.num_text_tokens for example in examples.values()]
  assert len(lengths) == 40 and min(lengths) < 64 < max(lengths) and lengths != sorted(lengths)
  found = []
  for batch in measure.make_batches(subject, is_bucketed=is_bucketed):
    tokens = batch.inputs.tokens
    slots = tokens.shape[1] - 16
    own = [int(length) - 16 for length in jax.tree.map(jnp.asarray, batch.inputs.layout).num_tokens()]
    assert tokens.shape[0] == 3
    assert own == [examples[row].num_text_tokens for row in batch.row_ids]
    if is_bucketed:
      assert {subject.batcher.bucket(examples[i]) for i in batch.row_ids} == {(1, 16, slots, False)}
    else:
      assert slots == max(own)
    found += own
  assert set(found) == set(lengths) and len(found) >= 40
  if not is_bucketed:
    assert found[:39] == lengths[:39]


def measurement(**fields):
  common = dict(programs=2, compile=10.0, instructions=5, temporaries=3.0, num_tokens=900, num_slots=1000)
  return common | dict(step_seconds=1.0, mix_seconds=9.0) | fields


def test_rows_are_medians_and_ratios_within_turns(tmp_path):
  gather = [measurement(compile=c, step_seconds=s) for c, s in ((1.0, 2.0), (3.0, 4.0), (2.0, 1.0))]
  mask = [measurement(step_seconds=s, mix_seconds=m) for s, m in ((1.0, 18.0), (8.0, 20.0), (3.0, 19.0))]
  account = dict(programs=1, compile=30.0, instructions=7, temporaries=5.0)
  gather, mask = report.make_rows(
    processes={"gather": [measurement(), *gather], "mask": [measurement(programs=1), *mask]},
    tpu={"gather": account | dict(collectives="2 all-reduce 1.0 MiB", selecting="none")},
  )
  assert (gather["programs"], gather["compile_cold"], gather["compile_cached"]) == (2, 10.0, 2.0)
  assert gather["step"] == 1.0 and mask["step"] == 2.0  # of 2, 1, 1 and of 1, 2, 3
  assert gather["padding"] == pytest.approx(0.1) and gather["temporaries"] == 3
  assert gather["tokens_per_second"] == 100 and mask["tokens_per_second"] == pytest.approx(900 / 19)
  assert gather["tokens_per_second_cold"] == pytest.approx(900 / 19)
  assert gather["tokens_per_second_cached"] == pytest.approx(900 / 11)
  assert gather["tpu_temporaries"] == 5 and "tpu_programs" not in mask
  static, slots = (
    [dict(programs=n, compile=c, memory=20 * 2**20, in_use=u, num_tokens=100, seconds=s) for c, s in given]
    for n, u, given in ((2, 0.3, ((9.0, 9.0), (5.0, 4.0))), (3, 0.8, ((10.0, 9.0), (4.0, 2.0))))
  )
  forms = report.make_form_rows({"static batches": static, "slots": slots}, 8)
  text = report.make([gather, mask], forms, "heading", "TPU").write(tmp_path, "compile_study", "command")
  assert (tmp_path / "compile_study.md").read_text() == text
  assert "| gather | 1 | 30.0 | 7 | 5 | 2 all-reduce 1.0 MiB | none |" in text
  assert (tmp_path / "compile_study.csv").read_text().startswith("variant,programs,compile_cold,compile_cached,")
  assert "| slots, 8 rows | 3 | 10.0 | 4.0 | 20 | 80.0% | 50.0 | 0.50 |" in text
  for plot in ("seconds", "break_even"):
    assert (tmp_path / f"{plot}.png").stat().st_size > 5000


def test_static_batches_and_slots_answer_the_same_rows(loaded, tmp_path, monkeypatch):
  monkeypatch.setattr(measure, "MOST_QUESTIONS", 2)
  inputs = InputConfig("chat", (128,), 4)
  setting = Setting(str(loaded("clip_mha").directory), "float32", 9, inputs, 0, (2, 4), (8, 3))
  static, slots = (answering.on_this_machine(form, setting, tmp_path) for form in answering.FORMS)
  assert static["num_tokens"] == slots["num_tokens"] == sum(draw_lengths(9))
  assert static["in_use"] < slots["in_use"] <= 1
  assert (static["programs"], slots["programs"]) == (3, 2)  # in one process they share the program of decoding
  assert static["memory"] > slots["memory"] > 0


def test_a_study_goes_on_where_it_stopped(loaded, tmp_path, monkeypatch):
  setting = Setting(str(loaded("clip_mha").directory), "float32", 3, InputConfig("chat", (128,), 2), 0, (2, 4), (8, 3))
  arguments = measure.on_this_machine, ["gather"], setting
  first = measure.in_turns(*arguments, turns=1, workdir=tmp_path)
  cold, turn = first["gather"]
  assert cold["programs"] == turn["programs"] >= 1 and cold["instructions"] == turn["instructions"]
  assert any((tmp_path / "compiled" / "gather").iterdir())
  (tmp_path / "gather-1.json").unlink()
  asked = []

  def instead(measured, variant, given, cache):
    assert measured is measure.on_this_machine
    asked.append((variant, given, cache.name))
    return cold | {"step_seconds": 7.0}

  monkeypatch.setattr(measure, "in_own_process", instead)
  again = measure.in_turns(*arguments, turns=1, workdir=tmp_path)
  assert asked == [("gather", setting, "gather")]
  assert again["gather"] == [cold, cold | {"step_seconds": 7.0}]
