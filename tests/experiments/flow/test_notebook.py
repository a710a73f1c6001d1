"""The notebook runs from its first cell to its last."""

import os
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.sampled(of="commands of studies")
def test_visual_flow(checkpoints, monkeypatch):
  """On a tiny checkpoint in place of the demo model: what it shows of that is in `experiments/results`."""
  monkeypatch.setenv(
    "XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
  )  # as its reader has
  notebook = nbformat.read(ROOT / "experiments" / "notebooks" / "visual_flow.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)
  for cell in notebook.cells:  # fewer of the same computations
    cell.source = cell.source.replace("NUM_QUESTIONS = 2", "NUM_QUESTIONS = 1")
    cell.source = cell.source.replace("where = [0, 4, 8, 16, 24]", "where = [3]")
    cell.source = cell.source.replace("layers = [0, 2, 4, 8, 12, 16, 20, 24]", "layers = [0, 1, 2, 3]")
    cell.source = (
      cell.source.replace("max_new_tokens=8", "max_new_tokens=2")
      .replace("himap((2, 8)", "himap((1, 3)")
      .replace("(288, 72)", "(8, 4)")
    )
    cell.source = cell.source.replace(
      'open_checkpoint("demo")', f'open_checkpoint("{checkpoints("dinov2_shrunk").directory}")'
    )
  NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
  printed = "".join(
    output.get("text", "")
    for cell in notebook.cells
    for output in cell.get("outputs", ())
    if output.output_type == "stream"
  )
  assert "image 16" in printed and "| with HiMAP:" in printed and "same token" in printed
  pictures = [
    output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
  ]
  assert len(pictures) == 5
