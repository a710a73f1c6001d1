"""Damaged converted copies, links to other folders, and weights that are not finite."""

import json
import os
import re
import shutil

import jax.numpy as jnp
import layouts
import numpy as np
import pytest

from checkpoints_convert import convert
from checkpoints_convert.errors import CheckpointError
from himap_jax import checkpoint


@pytest.fixture(scope="module")
def source(checkpoints):
  return checkpoints("clip_mha").directory


@pytest.fixture(scope="module")
def converted(source, cache, tmp_path_factory):
  return layouts.convert_to(source, tmp_path_factory.mktemp("converted") / "model")


def largest(directory):
  return max(
    (path for path in (directory / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
  )


def damage(path, how):
  data = bytearray(path.read_bytes())
  if how == "removed":
    path.unlink()
  elif how == "cut":
    path.write_bytes(data[: len(data) // 2])
  else:
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "removed", "a bit"])
def test_damaged_parameters(converted, tmp_path, how):
  copy = shutil.copytree(converted, tmp_path / "copy")
  damage(largest(copy), how)
  message = f"damaged: .*; remove the folder {re.escape(str(copy))} and convert the checkpoint again"
  with pytest.raises(CheckpointError, match=message) as error:
    layouts.flat_params(copy)
  assert "\n" not in str(error.value)


def test_a_marker_without_the_digest_of_the_parameters(converted, tmp_path):
  copy = shutil.copytree(converted, tmp_path / "copy")
  marker = json.loads((copy / "himap_jax.json").read_text())
  del marker["params"]
  (copy / "himap_jax.json").write_text(json.dumps(marker))
  with pytest.raises(CheckpointError, match="its files are not those that were converted"):
    layouts.flat_params(copy)


@pytest.mark.parametrize(
  ("changes", "report"),
  [
    ({"num_hidden_layers": 5}, "[0-9]+ unexpected .language_model.layers_5"),
    ({"num_hidden_layers": 7}, "[0-9]+ missing .language_model.layers_6"),
    ({"intermediate_size": 80}, "[0-9]+ mis-shaped .language_model.layers_0.mlp"),
  ],
  ids=["fewer layers", "more layers", "narrower"],
)
def test_another_configuration_than_the_weights(converted, tmp_path, changes, report):
  copy = shutil.copytree(converted, tmp_path / "copy")
  fields = json.loads((copy / "config.json").read_text())
  fields["text_config"] |= changes
  (copy / "config.json").write_text(json.dumps(fields))
  with pytest.raises(CheckpointError, match=f"{copy}: the weights are not those of the model .*: {report}") as error:
    layouts.flat_params(copy)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 7, "fingerprint": "x"}'])
def test_a_bad_marker_names_the_folder(converted, tmp_path, content):
  copy = shutil.copytree(converted, tmp_path / "copy")
  (copy / "himap_jax.json").write_text(content)
  with pytest.raises(
    CheckpointError, match=f"remove the folder {re.escape(str(copy))} and convert the checkpoint again"
  ):
    checkpoint.open_checkpoint(str(copy))


@pytest.mark.parametrize("how", ["cut", "removed", "a bit", "marker"])
def test_a_damaged_copy_in_our_cache_is_converted_again(source, cache, tmp_path, how, capsys):
  own, target = convert.open_source(str(source)), tmp_path / "copy"
  again = lambda: convert.convert_into_cache(own, target, checkpoint.describe, cache_dir=cache)  # noqa: E731
  expected = layouts.flat_params(again())
  before = largest(target).stat().st_mtime_ns
  again()
  assert largest(target).stat().st_mtime_ns == before and "damaged" not in capsys.readouterr().err
  if how == "marker":
    (target / "himap_jax.json").write_text("{")
  else:
    damage(largest(target), how)
  again()
  assert "it is converted again" in capsys.readouterr().err
  layouts.assert_same_trees(layouts.flat_params(target), expected)


def test_links_to_other_folders(source, tmp_path):
  copy = shutil.copytree(source, tmp_path / "copy")
  (tmp_path / "secret").write_text("secret")
  (copy / "inside.txt").symlink_to("config.json")
  checkpoint.open_checkpoint(str(copy))
  (copy / "notes.txt").symlink_to("../secret")
  layouts.refuses(copy, tmp_path / "target", "notes.txt: a link to .*secret, outside of the checkpoint")


@pytest.mark.parametrize("folder", ["params", "params/d", "additional_chat_templates"])
def test_links_in_inner_folders(converted, tmp_path, folder):
  copy = shutil.copytree(converted, tmp_path / "copy")
  (copy / folder).mkdir(exist_ok=True)
  (copy / folder / "more.jinja").symlink_to(tmp_path)
  with pytest.raises(CheckpointError, match=f"{folder}/more.jinja: a link to .*, outside of the checkpoint"):
    checkpoint.open_checkpoint(str(copy))


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "params/pipe"])
def test_pipes(converted, tmp_path, name):
  """They would never end; two links to each other are only unreadable."""
  copy = shutil.copytree(converted, tmp_path / "copy")
  (copy / "a").symlink_to("b")
  (copy / "b").symlink_to("a")
  checkpoint.open_checkpoint(str(copy))
  (copy / name).unlink(missing_ok=True)
  os.mkfifo(copy / name)
  with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
    checkpoint.open_checkpoint(str(copy))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite(source, tmp_path, value):
  name = "language_model.model.norm.weight"

  def change(tensors):
    (own,) = (key for key in tensors if key.endswith("language_model.norm.weight") or key == name)
    return tensors | {own: np.where(np.arange(len(tensors[own])) == 3, np.float32(value), tensors[own])}

  copy = layouts.copy_of(source, tmp_path / "copy", change=change)
  with pytest.raises(
    CheckpointError, match=r"weights that are NaN or infinite in float32: language_model\.norm\.weight$"
  ):
    checkpoint.open_checkpoint(str(copy)).restore(dtype=jnp.float32)
