"""Counts of a run over its rows."""

from himap_jax.run.summary import Result, Summary


def test_padding_is_that_of_answered_rows():
  summary = Summary()
  row = {"id": 1, "error": None}
  summary.count([Result(row, num_tiles=3, num_image_tokens=90, num_text_tokens=10, num_slots=125, num_padded_tiles=4)])
  summary.count([Result({"id": 2, "error": "no image"})])
  assert summary.padding() == "20.0% of the prompts' slots, 25.0% of the pictures' tiles or patches"
  summary.count([Result(row, num_tiles=1, num_image_tokens=90, num_text_tokens=10, num_slots=125, num_padded_tiles=1)])
  assert summary.padding() == "20.0% of the prompts' slots, 20.0% of the pictures' tiles or patches"


def test_the_first_error_names_its_row_once():
  for row_id, error, shown in (
    ("line:2", "line 2: not valid JSON", "line 2: not valid JSON"),
    ("b.csv:2", "line 2 of b.csv: not UTF-8", "b.csv:2: line 2 of b.csv: not UTF-8"),
    (7, "line 3: no image", "7: line 3: no image"),
  ):
    summary = Summary()
    summary.count([Result({"id": row_id, "error": error}), Result({"id": 8, "error": "later"})])
    assert summary.first_error == shown


def test_tiles_without_padding_are_not_named():
  summary = Summary()
  summary.count([Result({"id": 1, "error": None}, num_tiles=1, num_text_tokens=8, num_slots=16, num_padded_tiles=1)])
  assert summary.padding() == "50.0% of the prompts' slots"
