"""The command end to end: answers and all that is said of them."""

import json

import numpy as np
import pytest
import running
from running import changed, read, write_rows

import himap_jax
from himap_jax import Sampling, UserError
from himap_jax.engine.accounting import model_sizes
from himap_jax.engine.engine import Engine
from himap_jax.pruning.cost import costs
from himap_jax.run import job
from himap_jax.run.pictures import load_image

NAME = running.NAME
N, NUM_LAYERS, VOCAB = 16, 4, 272
MAX_NEW, PRUNE_LAYERS, KEEP, QUESTIONS = running.MAX_NEW, running.PRUNE_LAYERS, running.KEEP, running.QUESTIONS


class TestAnswers:
  def test_rows_are_those_of_the_library(self, config, loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # so that the table is not wrapped
    emit = frozenset({"tokens", "kept", "counts", "logits", "timing"})
    pictures = tmp_path / "deep" / "pictures"
    assert job.run(changed(config, emit=emit, pictures=pictures, strict=True)) == 0
    rows = read(config.output)
    expected = himap_jax.generate(
      loaded(NAME, batch_size=2),
      [load_image(tmp_path / f"{index}.png") for index in range(4)],
      list(QUESTIONS.values()),
      schedule=loaded(NAME).schedule("himap", PRUNE_LAYERS, KEEP),
      generation=himap_jax.GenerationConfig(max_new_tokens=MAX_NEW),
      inputs=himap_jax.InputConfig("<image>{question}", prompt_buckets=(40,), batch_size=2),
    )
    assert rows.keys() == QUESTIONS.keys()
    for row, answer in zip((rows[row_id] for row_id in QUESTIONS), expected, strict=True):
      assert list(row) == ["id", "answer", "error", "digest", "token_ids", "kept", "counts", "first_logits", "timing"]
      example = (
        loaded(NAME).prompts("<image>{question}").prepare([load_image(tmp_path / "0.png")], QUESTIONS[row["id"]])
      )
      text = len(example.tokens) - N
      assert row["counts"] == {"tiles": 1, "image_tokens": N, "text_tokens": text, "kept": list(KEEP)}
      assert (row["answer"], row["error"]) == (answer.text, None)
      assert row["token_ids"] == answer.token_ids
      assert 1 <= len(row["token_ids"]) <= MAX_NEW
      assert row["kept"] == answer.kept
      assert [len(stage) for stage in row["kept"]] == list(KEEP)
      assert set(row["kept"][1]) < set(row["kept"][0]) < set(range(N))
      assert all(stage == sorted(stage) for stage in row["kept"])
      assert len(row["first_logits"]) == VOCAB
      np.testing.assert_allclose(row["first_logits"], answer.first_logits, atol=1e-5, rtol=0)
      assert row["timing"].keys() == {"prefill_seconds", "decode_seconds"}
      assert min(row["timing"].values()) > 0
    assert sorted(path.name for path in pictures.iterdir()) == ["3.png", "4.png", "a.png", "b.png"]
    assert load_image(pictures / "3.png").size == (3 * (28 + 8) + 8, 28 + 16 + 2 * 8)

    table = capsys.readouterr().out
    for text in ("4 answered, 0 errors, 0 answered before", "rows/s", "device-hours for a million rows", "tokens/s", "himap",
                     "16, 8 from layer 2 on, 3 from layer 3 on", "HiMAP Eq. 10", "FLOPs on all tokens"):  # fmt: skip
      assert text in table
    assert running.num_programs(table) == 6  # for two buckets, of which the slots of each hold the other's rows

    before = config.output.read_bytes()
    assert job.run(changed(config, emit=emit)) == 0
    assert config.output.read_bytes() == before
    assert "0 answered, 0 errors, 4 answered before" in capsys.readouterr().out

  @pytest.mark.sampled(of="runs")
  def test_restore(self, config, loaded, tmp_path):
    rows = running.answers_of(config, restore=True, emit=frozenset({"logits"}))
    expected = himap_jax.generate(
      loaded(NAME, batch_size=2),
      [load_image(tmp_path / f"{index}.png") for index in range(4)],
      list(QUESTIONS.values()),
      schedule=loaded(NAME).schedule("himap", PRUNE_LAYERS, KEEP, restore=True),
      generation=himap_jax.GenerationConfig(max_new_tokens=MAX_NEW),
      inputs=himap_jax.InputConfig("<image>{question}", prompt_buckets=(40,), batch_size=2),
    )
    for row_id, answer in zip(QUESTIONS, expected, strict=True):
      assert rows[row_id]["answer"] == answer.text
      np.testing.assert_allclose(rows[row_id]["first_logits"], answer.first_logits, atol=1e-5, rtol=0)

  def test_other_settings_do_not_mix_with_the_rows_of_an_output(self, config):
    assert job.run(config) == 0
    before = config.output.read_bytes()
    for changes, message in (
      ({"method": "none", "prune_layers": None, "keep": None}, "method was 'himap', now 'none'"),
      ({"keep": (7, 3)}, "keep was .8, 3., now .7, 3."),
      ({"sampling": Sampling(0.5)}, "sampling was"),
      ({"image_aspect_ratio": "pad"}, "image_aspect_ratio was 'checkpoint', now 'pad'"),
      ({"restore": True}, "restore was False, now True"),
      ({"method": "divprune", "prune_layers": (0,), "keep": (8,), "keep_positions": True}, "keep_positions was False"),
    ):
      with pytest.raises(UserError, match=f"output.jsonl: made with other settings .*{message}.*--noresume"):
        job.run(changed(config, **changes))
      assert config.output.read_bytes() == before
    assert job.run(changed(config, batch_size=4, prompt_buckets=(40, 80))) == 0
    other = changed(config, keep=(7, 3), prompt_buckets=(64,), emit=frozenset({"kept"}))
    assert job.run(changed(other, resume=False)) == 0
    assert {len(row["kept"][0]) for row in read(config.output).values()} == {7}
    assert job.run(other) == 0

  def test_batches_and_buckets_change_nothing(self, config):
    emit = frozenset({"tokens", "kept"})
    expected = running.answers_of(config, emit=emit)
    assert running.answers_of(config, emit=emit, batch_size=3, prompt_buckets=(100,)) == expected

  @pytest.mark.sampled(of="runs")
  def test_rows_that_keep_different_counts(self, config, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    emit, threshold = frozenset({"tokens", "kept"}), 0.52
    config = changed(config, prompt_buckets=(64,), batch_size=4, max_new_tokens=2)
    rungs = ((4, 1), (8, 2), (12, 6))
    fixed = [running.answers_of(config, emit=emit, keep=keep) for keep in rungs[:2]]
    capsys.readouterr()
    adaptive = changed(
      config, emit=emit, method="himap_adaptive", keep=rungs[-1], output=tmp_path / "adaptive.jsonl",
      parameters=(("threshold", threshold),),
    )  # fmt: skip
    assert job.run(adaptive) == 0
    rows = read(adaptive.output)
    assert rows.keys() == fixed[0].keys()
    kept = []
    for name, row in rows.items():
      kept.append(tuple(map(len, row["kept"])))
      expected = fixed[rungs.index(kept[-1])][name]
      assert row | {"digest": None} == expected | {"digest": None}
    assert set(kept) == set(rungs[:2])
    means = [sum(counts) / 4 for counts in zip(*kept, strict=True)]
    table = capsys.readouterr().out
    assert f"16, {means[0]:.4g} from layer 2 on, {means[1]:.4g} from layer 3 on" in table
    opened = config.open()
    sizes, schedule = model_sizes(opened.config, (28, 28)), config.pruning.schedule(NUM_LAYERS, N)
    flops = sum(costs(sizes, schedule.with_counts(counts), N, 0).image_tokens for counts in kept)
    share = flops / 4 / costs(sizes, himap_jax.Schedule(), N, 0).image_tokens
    assert f"{share:.1%} of no pruning" in table.split("HiMAP Eq. 10")[1].split("\n")[0]
    with pytest.raises(
      UserError, match="made with other settings .method_parameters was .'threshold': 0.52., now .'thres"
    ):
      job.run(changed(adaptive, parameters=(("threshold", 0.7),)))

  @pytest.mark.sampled(of="runs")
  def test_rows_that_are_decoded_hold_what_their_output_needs(self, small, monkeypatch):
    held, answer = [], Engine.answer

    def watched(*arguments):
      for turn in answer(*arguments):
        for row in turn:
          prepared, _ = row.request.tag
          assert prepared.prompt.images == () and row.logits.base is None
          held.append(prepared.example.images.pixels.size)
        yield turn

    monkeypatch.setattr(Engine, "answer", watched)
    assert job.run(changed(small, emit=frozenset({"kept", "counts", "logits"}))) == 0
    assert held == [0] * 4 and {row["counts"]["tiles"] for row in read(small.output).values()} == {1}
    held.clear()
    assert job.run(changed(small, emit=frozenset({"patches"}), resume=False)) == 0
    assert min(held) > 0

  def test_no_pruning(self, config, loaded, tmp_path):
    rows = running.answers_of(
      changed(config, prompt_buckets=(64,)), method="none", prune_layers=None, keep=None, emit=frozenset({"kept"})
    )
    assert [row["kept"] for row in rows.values()] == [[]] * 4
    expected = himap_jax.generate(
      loaded(NAME, batch_size=2),
      [load_image(tmp_path / f"{index}.png") for index in range(4)],
      list(QUESTIONS.values()),
      generation=himap_jax.GenerationConfig(max_new_tokens=MAX_NEW),
      inputs=himap_jax.InputConfig("<image>{question}", prompt_buckets=(64,), batch_size=2),
    )
    assert [rows[row_id]["answer"] for row_id in QUESTIONS] == [answer.text for answer in expected]

  def test_profile(self, config, tmp_path):
    job.run(changed(config, profile_dir=tmp_path / "profile"))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    profile = trace.read_bytes()
    scopes = ("vision_tower", "projector", "prefill_layers_0_to_2", "prune_before_layer_2/score")
    for scope in (*scopes, "prune_before_layer_3/gather", "prefill_layers_3_to_4", "decode/"):
      assert scope.encode() in profile, scope

  def test_sampling_is_the_seed_s_alone(self, config):
    config = changed(
      config, sampling=Sampling(1.5, 0.9), emit=frozenset({"tokens"}), ignore_eos=True, prompt_buckets=(64,)
    )
    expected = running.answers_of(config, seed=1)
    assert all(len(row["token_ids"]) == MAX_NEW for row in expected.values())
    rows = list(map(json.loads, config.prompts.read_text().splitlines()))
    write_rows(config.prompts, rows[::-1])
    assert running.answers_of(config, seed=1) == expected
    write_rows(config.prompts, [rows[0] | {"id": 7}, rows[0] | {"id": "8"}])
    assert len({tuple(row["token_ids"]) for row in running.answers_of(config, seed=1).values()}) == 2
    write_rows(config.prompts, rows)
    other = running.answers_of(config, seed=2)
    assert sum(other[row_id] != row for row_id, row in expected.items()) >= 3
