"""Settings and checkpoints that stop a run before it has written anything."""

import json
import os
import pathlib
import shutil

import pytest
import running
from commands import ROOT
from running import changed
from safetensors.numpy import load_file, save_file

from checkpoints_convert.errors import CheckpointError
from himap_jax import UserError
from himap_jax.run import job

NAME = running.NAME
N = 16


def refuses(config, message):
  """A run that stops with a message of one line before it has written anything."""
  before = config.output.read_bytes() if os.path.isfile(config.output) else None
  with pytest.raises((UserError, CheckpointError)) as caught:
    job.run(config)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  after = config.output.read_bytes() if os.path.isfile(config.output) else None
  assert after == before


class TestBadConfiguration:
  @pytest.mark.parametrize(
    "changes, message",
    [
      (dict(keep=(N + 1, 3)), "cannot keep 17 image tokens before layer 2: there are 16"),
      (dict(keep=(4, 8)), "cannot keep 8 image tokens before layer 3: there are 4"),
      (dict(keep=(8, 0)), "cannot keep 0 image tokens"),
      (dict(keep=(8, -1)), "cannot keep -1 image tokens"),
      (dict(keep=(0.0, 0.0)), "must be above 0% and at most 100%"),
      (dict(keep=(1.5, 0.5)), "must be above 0% and at most 100%"),
      (dict(keep=(8,)), "has 2 stages, but keep has 1 values"),
      (dict(keep=(8, 4, 2)), "has 2 stages, but keep has 3 values"),
      (dict(prune_layers=(2,)), "has 2 stages, but prune_layers has 1 values"),
      (dict(prune_layers=(3, 2)), "pruning layers must ascend, but 2 follows 3"),
      (dict(prune_layers=(2, 2)), "pruning layers must ascend"),
      (dict(prune_layers=(0, 2)), "cannot prune before layer 0: it needs the attention"),
      (dict(prune_layers=(2, 6)), "cannot prune before layer 6: the model has layers 0 to 3"),
      (dict(prune_layers=(-1, 2)), "cannot prune before layer -1"),
      (dict(prune_layers=None), "cannot prune before layer 8"),
      (dict(method="none", prune_layers=None), "'none' has 0 stages, but keep has 2 values"),
      (dict(method="none", keep=None), "'none' has 0 stages, but prune_layers has 2 values"),
      (dict(parameters=(("threshold", 0.5),)), "threshold"),
      (dict(method="none", prune_layers=None, keep=None, restore=True), "method 'none' removes none"),
      (dict(prompt_template="{question}"), "a text with one <image>"),
      (dict(prompt_template="<image>\udce9{question}"), "--prompt_template has an unpaired surrogate"),
      (dict(prompt_buckets=(64, 32)), "must be positive and ascending, not 64,32"),
      (dict(prompt_buckets=()), "must be positive and ascending"),
      (dict(max_new_tokens=500), "context of 512 tokens does not hold"),
      (dict(image_dir=pathlib.Path("/nowhere")), "--image_dir=/nowhere: no such directory"),
      (dict(prompts=pathlib.Path("/nowhere")), "cannot read the prompt file /nowhere"),
      (dict(prompts=pathlib.Path(os.devnull)), "cannot read the prompt file /dev/null: not a regular file"),
      (dict(output=pathlib.Path("/proc/nowhere/output.jsonl")), "--output: cannot create the directory"),
      (dict(output=pathlib.Path("/dev/full")), "not a regular file"),
      (dict(output=pathlib.Path("x.csv")), "--output=x.csv: the output is JSONL, or parquet if its name ends with"),
      (dict(output=pathlib.Path("-")), "--output=-: rows are written to a file, from which a run continues; name one"),
      (dict(output=pathlib.Path("x.CSV")), "--output=x.CSV: the output is JSONL"),
      (dict(output=pathlib.Path("x.xls")), "--output=x.xls: the output is JSONL"),
      (dict(output=pathlib.Path("x" * 300)), "File name too long"),
      (dict(output=pathlib.Path(".")), "--output=. is a directory; name a file in it"),
      (dict(output=pathlib.Path("/")), "--output=/ is a directory; name a file in it"),
      (dict(output=pathlib.Path(f"{ROOT}/tests/"), checkpoint="/nowhere"), "/tests is a directory; name a file in it"),
      (dict(pictures=pathlib.Path("/proc/nowhere")), "--pictures: cannot create the directory"),
    ],
  )
  def test_stops_before_writing(self, config, changes, message):
    refuses(changed(config, **changes), message)

  def test_pictures_over_pictures(self, config, tmp_path):
    (tmp_path / "link").symlink_to(config.image_dir)
    refuses(changed(config, pictures=tmp_path / "link"), "is --image_dir, whose pictures it would overwrite")

  def test_output_over_prompts(self, config, tmp_path):
    refuses(changed(config, output=config.prompts), "which a run with this --output writes")
    (tmp_path / "link").symlink_to(config.prompts)
    refuses(changed(config, output=tmp_path / "link"), "which a run with this --output writes")

  def test_files_beside_the_output_over_prompts(self, config, tmp_path):
    for name, output in (("a.parquet.jsonl", "a.parquet"), ("a.jsonl.settings.json", "a.jsonl"), ("b.partial", "b")):
      (tmp_path / name).write_bytes(config.prompts.read_bytes())
      own = changed(config, prompts=tmp_path / name, output=tmp_path / output, resume=False)
      refuses(own, f"--prompts={tmp_path / name} is the file {tmp_path / name}, which a run with this --output writes")

  def test_processes_with_other_prompts(self, config, monkeypatch):
    monkeypatch.setattr("himap_jax.engine.processes.is_equal", lambda text: False)
    refuses(config, "the processes of this run have different prompts or flags")

  def test_no_devices(self, config, monkeypatch):
    def devices():
      raise RuntimeError("Unknown backend: 'gpus'\nSee the documentation.")

    monkeypatch.setattr("jax.devices", devices)
    refuses(config, "JAX finds no devices: Unknown backend: 'gpus'")

  def test_output_that_something_else_wrote(self, config):
    config.output.write_text("notes\n")
    refuses(config, "line 1 is not an output row")

  def test_output_that_was_there_stays(self, config):
    config.output.touch()
    refuses(changed(config, keep=(0, 0)), "cannot keep 0")
    assert config.output.exists()

  def test_pictures_of_tokens_that_are_no_grid(self, config, loaded, tmp_path):
    config = changed(config, checkpoint=str(loaded("clip_gqa_tied").directory), pictures=tmp_path / "pictures")
    refuses(config, "this model's 17 image tokens do not form its grid of 4 x 4 patches")

  def test_checkpoints(self, config, checkpoints, tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HIMAP_JAX_CACHE", str(cache))
    refuses(changed(config, checkpoint="/nowhere"), "neither a directory nor a Hugging Face id")
    refuses(changed(config, checkpoint="x" * 300), "File name too long")
    inside = shutil.copytree(checkpoints(NAME).directory, tmp_path / "inside")
    message = "answers.jsonl is in the directory of the checkpoint"
    refuses(changed(config, checkpoint=str(inside), output=inside / "answers.jsonl"), message)
    for name, spoil, message in (
      ("missing", lambda path: split(path)[1].unlink(), "1 of 2 shards are missing"),
      ("truncated", lambda path: os.truncate(split(path)[1], 5000), "truncated"),
      ("shapes", narrow, "multi_modal_projector"),
      ("type", lambda path: edit(path, model_type="paligemma"), "model_type is 'paligemma'"),
      ("text", lambda path: edit(path, text_config={"model_type": "mamba"}), "language model 'mamba'"),
      ("config", lambda path: (path / "config.json").write_text("{"), "cannot be read"),
      ("nothing", lambda path: (path / "config.json").unlink(), "cannot be read"),
      (
        "token",
        lambda path: edit(path, image_token_index=7),
        "has the id 7 in config.json, but <image> has 3 in the tokenizer",
      ),
      (
        "end",
        lambda path: (path / "generation_config.json").write_text('{"eos_token_id": "2"}'),
        "eos_token_id is ['2']",
      ),
      (
        "large_end",
        lambda path: (path / "generation_config.json").write_text('{"eos_token_id": [1, 272]}'),
        "eos_token_id is [1, 272]; needed: a token id below 272",
      ),
      (
        "processor",
        lambda path: edit(path, "processor_config.json", processor_class="LlavaX"),
        "the files of its processor are missing or damaged; only its tokenizer was found",
      ),
      ("link", lambda path: (path / "notes.txt").symlink_to(path / "none.txt"), "No such file"),
      ("pickled", lambda path: (path / "model.safetensors").rename(path / "model.bin"), "only pickled weights"),
    ):
      path = shutil.copytree(checkpoints(NAME).directory, tmp_path / name)
      spoil(path)
      refuses(changed(config, checkpoint=str(path)), message)


def split(path):
  """Splits the weights into two shards; returns their paths."""
  tensors = load_file(path / "model.safetensors")
  (path / "model.safetensors").unlink()
  names = sorted(tensors)
  shards = [path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
  parts = [names[::2], names[1::2]]
  for shard, part in zip(shards, parts, strict=True):
    save_file({name: tensors[name] for name in part}, shard)
  weight_map = {name: shard.name for shard, part in zip(shards, parts, strict=True) for name in part}
  (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return shards


def narrow(path):
  tensors = load_file(path / "model.safetensors")
  (name,) = (name for name in tensors if name.endswith("multi_modal_projector.linear_1.weight"))
  save_file(tensors | {name: tensors[name][:-1].copy()}, path / "model.safetensors")


def edit(path, name="config.json", **fields):
  config = json.loads((path / name).read_text())
  (path / name).write_text(json.dumps(config | fields))
