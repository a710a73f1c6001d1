"""Prompt files in every form, damaged, and rows of any JSON."""

import base64
import collections
import csv
import io
import json
import pathlib

import numpy as np
from campaign import bounded, mutations
from campaign.trials import Part, Trial
from hypothesis import strategies as st

from himap_jax.errors import UserError
from himap_jax.run.prompts import Prompt, read_prompts
from himap_jax.run.records import open_records

INPUTS = 100
MESSAGES = [
  {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
  {"role": "assistant", "content": "A dog."},
  {"role": "user", "content": "Why?"},
]
ROWS = [
  {"id": "a", "image": "a.png", "question": "What is it?"},
  {"id": 2, "image": ["a.png", "b.png"], "question": "What <image> is <image> it?", "max_new_tokens": 3},
  {"question_id": "c", "image": base64.b64encode(b"x" * 99).decode(), "text": "Ça? 犬", "stop": ["."]},
  {"id": "d", "messages": MESSAGES, "temperature": 0.5, "top_p": 0.9},
]
TABLE = [
  {"id": f"r{number}", "image": f"{number}.png", "question": f'Is it {number}, or "{number}"?'} for number in range(5)
]
FIELDS = (
  "id",
  "question_id",
  "image",
  "question",
  "text",
  "messages",
  "max_new_tokens",
  "temperature",
  "top_p",
  "stop",
)
PARTS = ("type", "text", "image", "image_url", "role", "content", "url", "path", "base64", "bytes")
KNOWN = st.sampled_from(["text", "image", "image_url", "user", "system", "assistant"])
CONTENT = st.recursive(
  mutations.VALUES | KNOWN,
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(PARTS), inner, max_size=4),
  max_leaves=8,
)
ROW = st.dictionaries(st.sampled_from(FIELDS), mutations.VALUES | KNOWN | CONTENT, max_size=5)


def prepare(kept: pathlib.Path) -> Trial:
  return bounded.trial(_attempts, INPUTS, kept)


def _attempts(random: np.random.Generator, directory: pathlib.Path, count: int) -> collections.Counter[str]:
  forms = {".jsonl": _jsonl(ROWS), ".csv": _csv(), ".parquet": _parquet(directory)}
  others = b"".join(forms.values())

  def damaged(number: int) -> str:
    del number
    suffix = str(random.choice(list(forms)))
    return _read(directory / f"prompts{suffix}", mutations.mutated(random, forms[suffix], others))

  found = bounded.each(range(count // 2), damaged)
  rows = st.lists(ROW, min_size=1, max_size=4)
  found.update(mutations.structured(random, count - count // 2, rows, lambda own: _read_rows(directory, own)))
  return found


def _read_rows(directory: pathlib.Path, rows: list[dict]) -> str:
  outcome = _read(directory / "prompts.jsonl", _jsonl(rows))
  assert outcome != "refused" or not any(rows), rows
  return outcome


def _read(path: pathlib.Path, content: bytes) -> str:
  path.write_bytes(content)
  try:
    own = read_prompts(open_records(path))
    prompts = list(own)
  except UserError as error:
    assert "\n" not in str(error)
    return "refused"
  assert [prompt.key for prompt in prompts] == list(own.keys) and len(set(own.keys)) == len(own)
  if path.suffix == ".jsonl":
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    assert len(prompts) == len(lines)
    for prompt, line in zip(prompts, lines, strict=True):
      _check(prompt, line)
  return "errors in rows" if any(prompt.error for prompt in prompts) else "read"


def _check(prompt: Prompt, line: bytes) -> None:
  """A row without an error is what its own line says."""
  if prompt.error is not None:
    assert "\n" not in prompt.error
    return
  row = json.loads(line)
  if row.get("messages") is None:
    asked = row["question"] if row.get("question") is not None else row["text"]
    named = row.get("image") if isinstance(row.get("image"), list) else [row.get("image")]
    held = [own.get("bytes") or own.get("path") if isinstance(own, dict) else own for own in named]
    assert prompt.question == asked and list(prompt.images) == [own for own in held if own is not None]
  assert prompt.id in (row.get("id"), row.get("question_id")), prompt


def _jsonl(rows: list[dict]) -> bytes:
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _csv() -> bytes:
  text = io.StringIO()
  writer = csv.DictWriter(text, list(TABLE[0]))
  writer.writeheader()
  writer.writerows(TABLE)
  return text.getvalue().encode()


def _parquet(directory: pathlib.Path) -> bytes:
  import pyarrow
  from pyarrow import parquet

  parquet.write_table(pyarrow.Table.from_pylist(TABLE), directory / "valid.parquet")
  return (directory / "valid.parquet").read_bytes()


PART = Part("Damaged prompt files are read, reported row by row, or refused in one line.", prepare, INPUTS)
