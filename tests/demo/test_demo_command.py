"""The command of the page in a process of its own: what it serves, and that nothing is left of it."""

import json
import pathlib
import urllib.request

import commands
import pytest
from absl import flags
from absl.testing import flagsaver
from served import NAME

from himap_jax.demo import __main__ as demo


def test_interrupted_while_it_reads_the_checkpoint(monkeypatch, capsys):
  def interrupted():
    raise KeyboardInterrupt

  monkeypatch.setattr("himap_jax.run.model_flags.one_row_config", interrupted)
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as caught:
    demo.main(flags.FLAGS(["demo"]))
  assert caught.value.code == 130 and capsys.readouterr().err == "\nhimap_jax.demo: interrupted\n"


@pytest.mark.sampled(of="demos")
def test_the_command(checkpoints):
  command = commands.Command(
    "himap_jax.demo", f"--checkpoint={checkpoints(NAME).directory}", "--prompt_template=<image>{question}",
    "--method=fastv", "--port=0", "--compilation_cache_dir=",
  )  # fmt: skip
  command.wait_until(lambda: "Ctrl-C ends it" in command.text()[0])
  try:
    with urllib.request.urlopen(f"{command.text()[0].split()[1]}config", timeout=60) as response:
      config = json.load(response)
  finally:
    command.interrupt()
    command.communicate()
  values = [component["props"].get("value") for component in config["components"]]
  assert "--method=fastv --prune_layers=2 --keep=8" in values
  assert not config["analytics_enabled"] and not config["footer_links"]
  (example,) = (pathlib.Path(value["path"]) for value in values if isinstance(value, dict))
  folder = example.parents[1]
  assert folder.name.startswith("himap_jax_page_") and not folder.exists()
  assert command.process.exitcode == 0 and "Traceback" not in command.text()[1]
