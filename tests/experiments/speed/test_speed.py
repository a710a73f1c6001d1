"""The comparison of speed: every side runs the same scenario, and PyTorch's side of HiMAP is HiMAP."""

import dataclasses
import os
import signal
from types import SimpleNamespace

import commands
import jax
import numpy as np
import pytest
import reference_himap
import tiny_checkpoints
import torch

from experiments.shared import geometries
from experiments.shared.lengths import LENGTHS, draw_lengths
from experiments.speed import __main__ as speed
from experiments.speed import measure, pytorch, side, tables, throughput
from experiments.speed.side import Job, Scenario, Weights
from experiments.speed.worker import CannotRun, Worker
from himap_jax import UserError

TINY = {
  "model_type": "llava",
  "image_token_index": 1,
  "vision_feature_layer": -2,
  "vision_feature_select_strategy": "default",
  "vision_config": tiny_checkpoints.CLIP,
  "text_config": tiny_checkpoints.LLAMA | {"num_hidden_layers": 9, "num_key_value_heads": 2},
}
SCENARIO = Scenario("tiny", num_instruction_tokens=9, batch_size=1, num_new_tokens=3)
SIDES = ("himap", "none/int8", *side.PYTORCH)


@pytest.fixture(autouse=True)
def with_torch(monkeypatch):
  """One side of the comparison is PyTorch."""
  monkeypatch.delenv("PYTHONPATH")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  with measure.random_file(tmp_path_factory.mktemp("weights"), 1 << 20) as path:
    yield path


def test_weights_lie_in_the_file_and_begin_again_where_it_ends(weights):
  file = Weights(weights)
  first, second = file.take((3, 5)), file.take((1 << 18, 1))
  assert second.ctypes.data - first.ctypes.data == 64
  assert file.take((1 << 18, 1)).ctypes.data == first.ctypes.data
  numbers = np.abs(second.astype(np.float32))
  assert 2**-7 <= numbers.min() < numbers.max() < 2**-6
  assert abs((second > 0).mean() - 0.5) < 0.01


@pytest.mark.parametrize("run", [speed.run, throughput.run])
@pytest.mark.parametrize("geometry", ["gemma3_4b", "llava_next_7b", "internvl_7b"])
def test_only_a_llava_is_compared_with_pytorch_s(run, geometry):
  with pytest.raises(UserError, match=f"--geometry: .* {geometry!r} is not supported; supported: demo, 1b, 7b, 13b$"):
    run(SimpleNamespace(geometry=geometry))


@pytest.mark.sampled(of="commands of studies")
def test_a_job(weights):
  """Every row has its length, in slots, in static batches and in PyTorch."""
  lengths = (3, 1, 6, 2, 4, 2)
  ours, theirs = (side.make(name, TINY, weights) for name in ("himap", "transformers"))
  slots, static = (ours.job(Job(SCENARIO, lengths, prefill, 2)) for prefill in (1, 2))
  assert slots["programs"] == 3 and static["slots in use"] == (2 + 6 + 4) / 2 / (2 + 5 + 3)
  assert static["slots in use"] < slots["slots in use"] <= 1
  results = {
    "slots": [slots] * 2,
    "static": [static] * 2,
    "transformers": [theirs.job(Job(SCENARIO, lengths, 2, 2))] * 2,
  }
  assert all(result["seconds"] > 0 for (result, _) in results.values())
  rows = throughput.summarize(results, len(lengths))
  assert [row["time of slots ÷ its time"] for row in rows[:2]] == [1, slots["seconds"] / static["seconds"]]
  *_, ours_line, _, their_line = throughput.markdown(rows)
  assert ours_line.startswith("| slots |") and "| 1.00 |" in ours_line and ours_line.endswith("| 3 |")
  assert their_line.endswith("| – | – | – |")


def test_lengths_of_a_job():
  lengths = draw_lengths(300)
  kinds = [sum(low <= length <= high for length in lengths) for low, high in LENGTHS]
  assert kinds == [100, 100, 100] and lengths != tuple(sorted(lengths))


@pytest.mark.sampled
@pytest.mark.parametrize("name", SIDES)
def test_a_side_gives_every_figure(name, weights):
  ran = side.make(name, TINY, weights)
  ran.prepare(SCENARIO)
  figures = ran.turn()
  assert figures.keys() == {"example", "decode"}
  assert figures["example"] > 2 * figures["decode"] > 0
  ran.prepare(dataclasses.replace(SCENARIO, num_new_tokens=1))
  figures = ran.turn()
  chooses = name not in ("none", "none/int8", *side.PYTORCH)
  assert figures.keys() == {"example", "tower", "prefill", *(["scoring"] if chooses else [])}
  assert min(figures.values()) > 0
  assert ran.accounting()["peak_bytes"] > 1 << 20


def test_weights_are_used_where_they_lie(weights):
  ran = side.make("none", TINY, weights)
  addresses = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(ran._model.params) if x.ndim > 1]
  assert len(set(addresses)) > 10
  assert max(addresses) - min(addresses) < 1 << 20


def test_the_authors_take_one_sequence(weights):
  ran = side.make("authors", TINY, weights)
  with pytest.raises(NotImplementedError, match="one sequence"):
    ran.prepare(Scenario("tiny", 9, 2, 1))


@pytest.mark.parametrize("with_cache", [False, True])
def test_the_authors_algorithm_is_himap(with_cache, weights, monkeypatch):
  monkeypatch.setattr(pytorch, "DTYPE", torch.float32)
  monkeypatch.setattr(pytorch.PyTorch, "_values", lambda self, name, shape, file: _amplified(name, shape))
  ran = pytorch.Authors(TINY, weights, with_cache=with_cache)
  ran.prepare(Scenario("tiny", 9, 1, 4))
  eager = pytorch.Authors(TINY, weights, with_cache=False)._model
  expected = reference_himap.generate(
    eager, ran._ids[0], ran._pixels, prune_layers=pytorch.PRUNE_LAYERS, keep=(8, 2), max_new_tokens=4
  )
  assert expected.lead > 1e-3 and expected.prompt.margin > 1e-5
  chosen = []
  extend, run = ran._extend, ran._run

  def note(logits):
    chosen.append(logits[0].argmax().item())
    return logits

  ran._run = lambda *arguments: note(run(*arguments))
  ran._extend = lambda *arguments: note(extend(*arguments))
  with torch.inference_mode():
    torch.testing.assert_close(ran._prefill()[0], expected.prompt.logits[-1], atol=1e-4, rtol=0)
    chosen.clear()
    ran._times()
  assert chosen == expected.tokens


def _amplified(name, shape):
  if len(shape) < 2:
    return torch.full(shape, float(not name.endswith("bias")))
  generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
  return torch.randn(shape, generator=generator) * (2.0 if "proj" in name else 1.0) / shape[-1] ** 0.5


@pytest.mark.sampled(of="commands of studies")
def test_decoded_tokens_read_weights_and_cache(weights):
  ran = side.make("himap", TINY, weights)
  ran.prepare(SCENARIO)
  accounting = ran.accounting()
  text, heads = TINY["text_config"], 2
  width, ffn, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
  matrices = layers * (2 * width**2 + 2 * width * heads * 12 + 3 * width * ffn) + width * text["vocab_size"]
  norms = (2 * layers + 1) * width
  slots = 2 * 16 + 6 * 8 + (layers - 8) * 2 + layers * (35 + 9)
  cache = 2 * 2 * slots * heads * 12
  assert accounting["decode_bytes_needed"] == 2 * (matrices + norms) + cache
  assert accounting["decode_bytes"] > accounting["decode_bytes_needed"]


class Here(Worker):
  """A worker without a process of its own."""

  def _start(self):
    self._side = side.make(*self._arguments)
    self.device = self._side.device

  def __exit__(self, *_):
    pass

  def _exchange(self, method, arguments):
    try:
      return getattr(self._side, method)(*arguments)
    except NotImplementedError as error:
      raise CannotRun(str(error)) from error


@pytest.mark.sampled(of="commands of studies")
def test_a_worker_that_is_killed_begins_anew(weights):
  with Worker("authors", TINY, weights) as worker:
    assert worker.device == "cpu"
    with pytest.raises(CannotRun, match="one sequence"):
      worker.call("prepare", dataclasses.replace(SCENARIO, batch_size=2))
    worker.call("prepare", SCENARIO)
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(CannotRun, match="killed"):
      worker.call("turn")
    with pytest.raises(RuntimeError, match="AttributeError"):
      worker.call("turn")  # not prepared
    worker.call("prepare", SCENARIO)
    assert worker.call("turn")["example"] > 0


@pytest.mark.sampled(of="commands of studies")
def test_a_study_measures_once_and_writes_tables(tmp_path, monkeypatch):
  monkeypatch.setitem(geometries.GEOMETRIES, "tiny", TINY)
  monkeypatch.setattr(measure, "Worker", Here)
  grid = [Scenario("tiny", 9, 2, 1)]
  for directory in ("work", "output"):
    (tmp_path / directory).mkdir()

  def run():
    where = {"workdir": tmp_path / "work", "weights_dir": tmp_path}
    return measure.run(grid, ("himap", "none", "authors"), turns=2, at_once=2, **where)

  run()
  before = {path: path.read_bytes() for path in (tmp_path / "work").iterdir()}
  assert len(before) == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["output", "work"]
  monkeypatch.setattr(measure, "Worker", None)
  results = run()
  assert {path: path.read_bytes() for path in (tmp_path / "work").iterdir()} == before
  (result,) = results.values()
  assert result["authors"] == {"cannot": "one sequence at a time"}
  assert result["himap"]["device"] == "cpu" and result["himap"]["peak_bytes"] > 1 << 20
  assert len(result["himap"]["turns"]) == 2 and "decode" not in result["himap"]["turns"][0]
  tables.report(results, "2 turns").write(tmp_path / "output", "speed", "What it is")
  text = (tmp_path / "output" / "speed.md").read_text()
  assert (
    text.startswith("`What it is`, 2 turns; devices: cpu.")
    and "HiMAP prefill ÷ our vanilla prefill | tiny | 9 | 2 | 1" in text
  )


def test_ratios_are_medians_over_turns():
  results = {
    "himap": {"turns": [{"prefill": 1.0}, {"prefill": 2.0}, {"prefill": 9.0}]},
    "none": {"turns": [{"prefill": 2.0}, {"prefill": 8.0}, {"prefill": 9.0}]},
    "authors": {"cannot": "no"},
  }
  assert tables.ratio(results, "himap prefill", "none prefill") == 0.5
  assert tables.ratio(results, "himap prefill", "authors prefill") is None
  assert tables.ratio(results, "himap decode", "none decode") is None
  held = {row["ratio"]: row for row in tables.targets({Scenario("7b", 20, 1, 1): results})}
  assert held["HiMAP prefill ÷ our vanilla prefill"]["measured"] == 0.5
  assert held["HiMAP prefill ÷ our vanilla prefill"]["target"] == pytest.approx(1.1 * 0.31, abs=0.02)
  rows = {row["side"]: row for row in tables.figures({SCENARIO: results})}
  assert rows["himap"]["prefill"] == 2.0 and rows["himap"]["prefill_spread"] == 4.0
  assert rows["authors"]["prefill"] is None and rows["authors"]["cannot"] == "no"


@pytest.mark.sampled(of="commands of studies")
def test_starts_by_phase(checkpoints, tmp_path):
  tiny_checkpoints.noise_image((40, 40), seed=0).save(tmp_path / "0.png")
  (tmp_path / "prompts.jsonl").write_text('{"id": 0, "image": "0.png", "question": "Why?"}\n')
  where = [f"--checkpoint={checkpoints('clip_mha').directory}", f"--prompts={tmp_path / 'prompts.jsonl'}"]
  command = "experiments.speed.startup --starts=1 --dtype=float32 --method=fastv".split()
  printed = commands.Command(*command, *where, f"--image_dir={tmp_path}", COLUMNS="200").succeeded()
  for phase in ("imports", "tokenizer", "reading the weights", "compiled programs", "the first answer", "the end"):
    assert phase in printed
  assert float(printed.split("later ÷ first:")[1]) > 0
