"""The notebook runs from its first cell to its last."""

import pathlib

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[3]


def test_visual_flow(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")  # one device, as its reader has
  monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
  notebook = nbformat.read(ROOT / "experiments" / "notebooks" / "visual_flow.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)
  for cell in notebook.cells:  # fewer of the same computations
    cell.source = cell.source.replace("NUM_QUESTIONS = 2", "NUM_QUESTIONS = 1")
    cell.source = cell.source.replace("where = [0, 4, 8, 16, 24]", "where = [0, 24]")
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
