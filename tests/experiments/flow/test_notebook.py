"""The notebook runs from its first cell to its last."""

import json
import pathlib
import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from safetensors.numpy import load_file, save_file

from himap_jax import checkpoint

ROOT = pathlib.Path(__file__).parents[3]
NUM_LAYERS = 4


@pytest.fixture
def shallow_demo(tmp_path):
  """The demo model with its first decoder layers alone, which compile sooner."""
  directory = tmp_path / "demo"
  shutil.copytree(checkpoint.open_checkpoint("demo").directory, directory)
  fields = json.loads((directory / "config.json").read_text())
  fields["text_config"]["num_hidden_layers"] = NUM_LAYERS
  (directory / "config.json").write_text(json.dumps(fields))
  (path,) = directory.glob("*.safetensors")
  above = tuple(f"layers.{layer}." for layer in range(NUM_LAYERS, 30))
  kept = {name: x for name, x in load_file(path).items() if "vision" in name or not any(one in name for one in above)}
  path.unlink()
  save_file(kept, path)
  return directory


def test_visual_flow(shallow_demo, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")  # one device, as its reader has
  monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
  notebook = nbformat.read(ROOT / "experiments" / "notebooks" / "visual_flow.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)
  for cell in notebook.cells:  # fewer of the same computations
    cell.source = cell.source.replace("NUM_QUESTIONS = 2", "NUM_QUESTIONS = 1")
    cell.source = cell.source.replace("where = [0, 4, 8, 16, 24]", "where = [0, 3]")
    cell.source = cell.source.replace("layers = [0, 2, 4, 8, 12, 16, 20, 24]", "layers = [0, 1, 2, 3]")
    cell.source = cell.source.replace("max_new_tokens=8", "max_new_tokens=2").replace("himap((2, 8)", "himap((1, 3)")
    cell.source = cell.source.replace('open_checkpoint("demo")', f'open_checkpoint("{shallow_demo}")')
  NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
  printed = "".join(
    output.get("text", "")
    for cell in notebook.cells
    for output in cell.get("outputs", ())
    if output.output_type == "stream"
  )
  assert "image 576" in printed and "| with HiMAP:" in printed and "same token" in printed
  pictures = [
    output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
  ]
  assert len(pictures) == 5
