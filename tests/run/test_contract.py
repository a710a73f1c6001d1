"""What an output promises: its rows are the answers to its prompts with its settings, whatever happened in between."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from running import NAME, changed, read, write_rows
from safetensors.numpy import load_file, save_file

from checkpoints_convert.convert import convert, open_source
from himap_jax import Sampling, UserError
from himap_jax.checkpoint import describe
from himap_jax.engine.engine import Engine
from himap_jax.families.family import Message
from himap_jax.run import job
from himap_jax.run.contract import Comparison, Contract, digest_of
from himap_jax.run.output import Output
from himap_jax.run.pictures import PictureFiles
from himap_jax.run.prompts import Options, Prompt, Prompts
from himap_jax.run.writer import OutputWriter


@pytest.fixture
def config(small):
  return small


@pytest.fixture
def killed(monkeypatch):
  """Returns `run(config)`: a run that ends at its first batch, before it has answered anything."""

  def run(config):
    with monkeypatch.context() as patch:
      patch.setattr(Engine, "answer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
      with pytest.raises(KeyboardInterrupt):
        job.run(config)

  return run


def other(config):
  return changed(config, keep=(7, 2))


def answered_before(config, capsys):
  capsys.readouterr()
  assert job.run(config) == 0
  return int(capsys.readouterr().out.split(" answered before")[0].split()[-1])


class TestSettings:
  def test_rows_decide_and_not_the_file_beside_them(self, config, killed, capsys):
    """A run with --noresume and another method, killed between start-up and its first batch, changes nothing."""
    assert job.run(config) == 0
    settings = config.output.with_name("output.jsonl.settings.json")
    before, settings_before = config.output.read_bytes(), settings.read_bytes()
    killed(changed(other(config), resume=False))
    assert (config.output.read_bytes(), settings.read_bytes()) == (before, settings_before)
    with pytest.raises(
      UserError, match="output.jsonl: made with other settings .keep was .8, 3., now .7, 2.*--noresume"
    ):
      job.run(other(config))

    # Killed a little later: the settings are the new run's, the rows are not.
    contract = Contract(config.output, json.loads(settings_before) | {"keep": [7, 2]}, Prompts.of(()))
    contract.write_settings()
    for unreadable in (False, True):
      with pytest.raises(
        UserError, match="output.jsonl: made with other settings; use another --output, or --noresume"
      ):
        job.run(other(config))
      if unreadable:
        settings.write_text("{")
    assert config.output.read_bytes() == before
    settings.unlink()
    with pytest.raises(UserError, match="made with other settings; use"):
      job.run(other(config))
    assert answered_before(config, capsys) == 4 and config.output.read_bytes() == before

    assert job.run(changed(other(config), resume=False)) == 0
    assert answered_before(other(config), capsys) == 4
    assert json.loads(settings.read_text())["keep"] == [7, 2]
    with pytest.raises(UserError, match="keep was .7, 2., now .8, 3."):
      job.run(config)

  def test_rows_of_two_settings_are_never_mixed(self, config, tmp_path):
    assert job.run(config) == 0
    rows = list(read(config.output).values())
    rows[2]["digest"] = "0" * 16 + rows[2]["digest"][16:]
    write_rows(config.output, rows)
    with pytest.raises(UserError, match="made with other settings"):
      job.run(config)
    write_rows(config.output, [row | {"error": "failed"} if row is rows[2] else row for row in rows])
    assert job.run(config) == 0  # an error is no answer, and is replaced
    assert len({row["digest"][:16] for row in read(config.output).values()}) == 1

  def test_a_changed_checkpoint_at_the_same_path(self, config, checkpoints, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HIMAP_JAX_CACHE", str(cache))
    path = shutil.copytree(checkpoints("clip_mha").directory, tmp_path / "checkpoint")
    config = changed(config, checkpoint=str(path))
    assert job.run(config) == 0
    before = config.output.read_bytes()
    moved = shutil.copytree(path, tmp_path / "moved")
    assert job.run(changed(config, checkpoint=str(moved))) == 0 and config.output.read_bytes() == before
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("lm_head.weight"))
    tensors[name] = np.flip(tensors[name], 0).copy()
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError, match="made with other settings .checkpoint was '\\w+', now '\\w+'.*--noresume"):
      job.run(config)
    assert config.output.read_bytes() == before
    assert job.run(changed(config, resume=False)) == 0
    after = read(config.output)
    assert any(after[row["id"]]["answer"] != row["answer"] for row in map(json.loads, before.splitlines()))

  @pytest.mark.parametrize(
    "name", ["tokenizer.json", "processor_config.json", "generation_config.json", "chat_template.jinja"]
  )
  @pytest.mark.parametrize("is_converted", [False, True])
  def test_a_changed_file_of_the_checkpoint(
    self, config, name, is_converted, checkpoints, tmp_path, monkeypatch, cache
  ):
    monkeypatch.setenv("HIMAP_JAX_CACHE", str(cache))
    path = shutil.copytree(checkpoints("clip_mha").directory, tmp_path / "checkpoint")
    if is_converted:
      path = convert(open_source(path), tmp_path / "converted", describe, cache_dir=cache)
    config = changed(config, checkpoint=str(path))
    assert job.run(config) == 0
    (path / name).write_text((path / name).read_text() + "\n")
    with pytest.raises(UserError, match="made with other settings .checkpoint was '\\w+', now '\\w+'.*--noresume"):
      job.run(config)

  def test_a_checkpoint_that_changes_while_a_run_begins(self, config, checkpoints, tmp_path, monkeypatch):
    directory = shutil.copytree(checkpoints(NAME).directory, tmp_path / "checkpoint")
    sizes = job.image_sizes

    def change(*args):
      with open(directory / "chat_template.jinja", "a") as file:
        file.write(" ")
      return sizes(*args)

    monkeypatch.setattr(job, "image_sizes", change)
    with pytest.raises(UserError, match=f"{directory}: the checkpoint has changed since the run began"):
      job.run(changed(config, checkpoint=str(directory)))
    assert not config.output.exists()

  def test_everything_that_answers_depend_on_is_in_the_digest(self, config):
    def digest(config, weights="w"):
      return digest_of(job.settings(config, config.pruning.schedule(6, 16), weights))

    digests = [digest(config), digest(config, "v")]
    for changes in (
      {"method": "himap_swapped"}, {"prune_layers": (2, 5)}, {"keep": (8, 4)}, {"max_new_tokens": 7}, {"seed": 1},
      {"sampling": Sampling(0.5)}, {"sampling": Sampling(0.5, 0.9)}, {"ignore_eos": True}, {"dtype": "bfloat16"},
      {"prompt_template": "chat"}, {"max_image_tokens": 9}, {"int8_weights": True}, {"emit": frozenset({"kept"})},
      {"method": "himap_adaptive", "parameters": (("threshold", 0.5),)},
      {"method": "himap_adaptive", "parameters": (("threshold", 0.6),)},
    ):  # fmt: skip
      digests.append(digest(changed(config, **changes)))
    assert len(set(digests)) == len(digests)
    same = changed(config, batch_size=3, prompt_buckets=(9,), mesh={"data": 2}, strict=True, pictures=config.output)
    assert digest(same) == digest(config)
    assert digest(changed(config, keep=(0.5, 3))) == digest(config)


class TestPrompts:
  def test_a_changed_question_or_picture_is_answered_again(self, config, killed, capsys, tmp_path):
    assert job.run(config) == 0
    before = config.output.read_bytes()
    first = read(config.output)
    rows = list(map(json.loads, config.prompts.read_text().splitlines()))
    rows[1]["question"] = "Why not?"
    write_rows(config.prompts, rows[::-1])
    shutil.copy(tmp_path / "0.png", tmp_path / "2.png")
    killed(config)
    assert config.output.read_bytes() == before  # the old rows stay until new ones are there
    assert answered_before(config, capsys) == 2
    second = read(config.output)
    assert {row_id for row_id in first if first[row_id] != second[row_id]} == {"b", 3}
    assert {row["digest"][:17] for row in second.values()} == {first["a"]["digest"][:17]}
    write_rows(config.prompts, rows)
    after = config.output.read_bytes()
    assert answered_before(config, capsys) == 4 and config.output.read_bytes() == after
    assert job.run(changed(config, output=tmp_path / "new.jsonl")) == 0
    assert read(tmp_path / "new.jsonl") == second

  def test_no_answer_is_lost_with_its_picture(self, config, capsys, tmp_path):
    rows = list(map(json.loads, config.prompts.read_text().splitlines()))
    (tmp_path / "1.png").rename(tmp_path / hashlib.sha256().hexdigest())  # a name that is base64, too
    write_rows(config.prompts, [rows[0], rows[1] | {"image": hashlib.sha256().hexdigest()}, *rows[2:]])
    assert job.run(config) == 0
    before = config.output.read_bytes()
    for path in (*tmp_path.glob("?.png"), tmp_path / hashlib.sha256().hexdigest()):
      path.unlink()
    assert answered_before(config, capsys) == 4 and config.output.read_bytes() == before
    assert job.run(config) == 0 and "4 pictures of answered rows cannot be read" in capsys.readouterr().err
    rows = list(map(json.loads, config.prompts.read_text().splitlines()))
    write_rows(config.prompts, [rows[0] | {"question": "And this?"}, *rows[1:]])
    assert answered_before(config, capsys) == 3
    assert "No such file" in read(config.output)["a"]["error"]

  def test_a_number_and_its_text_are_one_id(self, config, capsys, tmp_path):
    rows = [{"id": i, "image": "0.png", "question": question} for i, question in ((1, "Why?"), ("1", "And this?"))]
    write_rows(config.prompts, rows)
    assert job.run(changed(config, pictures=tmp_path / "pictures")) == 0
    assert read(config.output).keys() == {1, "line:2"}
    assert 'line 2: the id "1" was already used on line 1' in read(config.output)["line:2"]["error"]
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["1.png"]
    answer = read(config.output)[1]
    write_rows(config.prompts, [rows[0] | {"id": "1"}])
    assert answered_before(config, capsys) == 1 and read(config.output)[1] == answer

  def test_an_error_is_tried_again_with_other_settings_too(self, config, tmp_path):
    write_rows(config.prompts, [{"id": "a", "image": "missing.png", "question": "Why?"}])
    assert job.run(config) == 1  # no row has an answer
    (tmp_path / "0.png").rename(tmp_path / "missing.png")
    assert job.run(other(config)) == 0
    assert read(config.output)["a"]["answer"] is not None


class TestContract:
  @pytest.fixture
  def contract(self, tmp_path):
    for name in "ab":
      (tmp_path / name).write_text(name)
    prompts = [Prompt(1, ("a",), "What?"), Prompt("2", ("a",), "Why?"), Prompt("line:3", error="line 3: bad")]
    settings = {"method": "himap", "keep": (8, 3)}
    return Contract(tmp_path / "output.jsonl", settings, Prompts.of(prompts), PictureFiles(tmp_path))

  def row(self, contract, number=0, **changes):
    prompt = list(contract.prompts)[number]
    digest = contract.row_digest(prompt, ["ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"])
    return prompt.row(digest, answer="yes") | changes

  def is_stale(self, contract, row):
    comparison = Comparison(contract)
    return comparison.is_failed(row) or comparison.changed() == {str(row["id"])}

  def test_a_digest(self, contract):
    digest = self.row(contract)["digest"]
    assert digest == f"{digest_of({'method': 'himap', 'keep': [8, 3]})}-{digest[17:33]}-ca978112ca1bbdca-{digest[51:]}"
    assert len(digest) == 67 and self.row(contract, 1)["digest"][51:] == digest[51:]
    assert self.row(contract, 1)["digest"][17:33] != digest[17:33]
    assert contract.row_digest(next(iter(contract.prompts))) == digest[:34] + "0" * 16 + digest[50:]

  def test_what_is_stale(self, contract, tmp_path):
    assert not self.is_stale(contract, self.row(contract)) and not self.is_stale(contract, self.row(contract, id="1"))
    assert not self.is_stale(contract, self.row(contract, id="not asked", error="failed"))
    assert self.is_stale(contract, self.row(contract, error="failed"))
    for label in ("line:9", "row:9", "b.parquet:9"):  # of a row that has been mended since
      assert self.is_stale(contract, self.row(contract, id=label, error="failed"))
      assert not self.is_stale(contract, self.row(contract, id=label))
    assert self.is_stale(contract, self.row(contract, 1, id=1))
    digest = self.row(contract)["digest"]
    assert self.is_stale(contract, self.row(contract, digest=digest[:34] + "0" * 16 + digest[50:]))
    assert not self.is_stale(contract, self.row(contract, digest=digest[:51] + "0" * 16))  # the bytes are the same
    assert self.is_stale(contract, self.row(contract, id="line:3"))
    for refused in ("", "0" * 16 + digest[16:]):
      for row_id in (1, "not asked"):
        with pytest.raises(UserError, match="output.jsonl: made with other settings; use another"):
          self.is_stale(contract, self.row(contract, id=row_id, digest=refused))
      assert self.is_stale(contract, self.row(contract, digest=refused, error="failed"))

  @pytest.mark.parametrize(
    "now", [("http://h/b.png",), ("http://h/a.png", "http://h/c.png"), ("http://h/a.png", "b"), ()]
  )
  def test_another_address_is_another_picture(self, contract, now):
    """No picture on the web is downloaded to compare it."""
    before = Prompt(1, ("http://h/a.png",), "What?")
    row = before.row(contract.row_digest(before, [contract.files.digest("http://h/a.png")]), answer="yes")
    assert not self.is_stale(dataclasses.replace(contract, prompts=Prompts.of([before])), row)
    assert self.is_stale(dataclasses.replace(contract, prompts=Prompts.of([Prompt(1, now, "What?")])), row)

  @pytest.mark.parametrize(
    ("before", "now"),
    [
      (("a",), ("gone",)),
      (("a",), ("a", "gone")),
      (("a", "gone"), ("b", "gone")),
      (("data:image/png;base64,iVBO",), ("data:image/png;base64,iVB",)),
    ],
    ids=["renamed", "one more", "another beside it", "damaged data"],
  )
  def test_another_name_of_a_picture_that_cannot_be_read_is_another_picture(self, contract, before, now):
    before, now = (Prompt(1, images, "What?") for images in (before, now))
    row = before.row(contract.row_digest(before, ["0" * 64] * len(before.images)), answer="yes")
    comparison = Comparison(dataclasses.replace(contract, prompts=Prompts.of([now])))
    assert not comparison.is_failed(row)
    assert comparison.changed() == {"1"} and not comparison.num_unreadable

  def test_different_questions_are_different_texts(self):
    conversation, options = (Message("user", "hi"),), Options(stop=("x",))
    questions = [conversation, '[["user", "hi"]]', "hi", '["hi"]', '["[\\"hi\\"]"]']
    prompts = [Prompt(1, (), question) for question in questions]
    prompts += [dataclasses.replace(prompt, options=options) for prompt in prompts]
    prompts += [Prompt(1, (), prompt.asked) for prompt in prompts]
    assert len({prompt.asked for prompt in prompts}) == len(set(prompts))

  def test_every_picture_is_read_once(self, contract, monkeypatch):
    calls = []
    monkeypatch.setattr(PictureFiles, "digest", lambda self, path: calls.append(path))
    comparison = Comparison(contract)
    assert not any(comparison.is_failed(self.row(contract, number)) for number in (0, 1, 0))
    assert comparison.changed() == set() and comparison.num_unreadable == 1
    assert len(calls) == 1

  def test_settings_are_written_whole_and_before_the_rows(self, contract, monkeypatch):
    path = contract.output.with_name("output.jsonl.settings.json")
    with Output(contract, resume=True) as output:
      output.write([])
      assert not path.exists() and not output.answered.any()
      with monkeypatch.context() as patch:
        patch.setattr(OutputWriter, "write", lambda *_: pytest.fail("rows first") if not path.exists() else None)
        output.write([self.row(contract)])
    assert json.loads(path.read_text()) == {"digest": contract.digest, "method": "himap", "keep": [8, 3]}
    path.unlink()
    path.mkdir()
    with Output(contract, resume=True) as output, pytest.raises(UserError, match="cannot write .*settings.json"):
      output.write([self.row(contract)])

  @pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET"])
  def test_a_table_by_its_suffix(self, contract, name):
    contract = dataclasses.replace(contract, output=contract.output.with_name(name))
    with Output(contract, resume=True) as output:
      output.write([self.row(contract)])
    assert contract.output.read_bytes().startswith(b"PAR1")

  def test_the_first_process_refuses_for_all(self, contract, monkeypatch):
    contract.output.write_text("notes\n")
    sums = []
    with monkeypatch.context() as patch:
      patch.setattr(
        "himap_jax.engine.processes.sum_over_processes", lambda values: sums.append(values) or np.array(values)
      )
      with pytest.raises(UserError, match="line 1 is not an output row"):
        Output(contract, resume=True)
    assert [total.tolist() for total in sums] == [[0, 0, 0, 1]]
    monkeypatch.setattr("himap_jax.engine.processes.is_leader", lambda: False)
    monkeypatch.setattr("himap_jax.engine.processes.sum_over_processes", lambda values: np.array(sums[0]) + values)
    with pytest.raises(UserError, match="the first process of this run cannot start"):
      Output(contract, resume=True)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="have different flags or checkpoints"):
      patch.setattr("himap_jax.engine.processes.is_equal", lambda text: text != contract.digest)
      Output(contract, resume=True)
    monkeypatch.setattr("himap_jax.engine.processes.sum_over_processes", lambda values: np.array([0, 1, 0, 0]) + values)
    with Output(contract, resume=True) as output:
      assert output.answered.tolist() == [False, True, False]
      output.write([self.row(contract)])
    assert contract.output.read_text() == "notes\n"
