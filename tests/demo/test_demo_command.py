"""The command of the page in a process of its own: what it serves, and that nothing is left of it."""

import json
import pathlib
import urllib.request

import commands
import pytest
from served import NAME


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
