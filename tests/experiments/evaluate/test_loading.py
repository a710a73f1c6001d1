"""Samples of every task in the layouts in which its data is published, and data that is not as it should be."""

import json
import pathlib

import local_hub
import published
import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.evaluate import loading
from experiments.evaluate.report import write_submission
from experiments.evaluate.tasks import TASKS, find_task
from himap_jax.errors import UserError


def load(name, source, **arguments):
  return list(loading.load(TASKS[name], source and str(source), **arguments))


COUNTS = {
  "vqav2": 2, "vqav2_testdev": 1, "textvqa": 1, "textvqa_ocr": 1, "gqa": 1, "scienceqa_img": 2, "aokvqa": 2,
  "aokvqa_direct": 1, "mme": 6, "mme_perception": 4, "mme_cognition": 2, "mme_count": 2, "pope": 3, "chartqa": 2,
  "docvqa": 1, "docvqa_test": 1, "nocaps": 2, "flickr30k": 1, "mmbench_en": 3, "seed_image": 1, "mmmu": 2,
}  # fmt: skip
UNANSWERED = ("vqav2_testdev", "docvqa_test")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_reads_the_layout_of_the_hub(name, tmp_path, monkeypatch):
  directory = published.write_hub(name, tmp_path)
  samples = load(name, directory)
  assert len(samples) == COUNTS[name] and len({sample.id for sample in samples}) == len(samples)
  for sample in samples:
    assert sample.error is None and sample.question and "<image>" not in sample.question
    assert all(image.startswith(b"\x89PNG") for image in sample.images) and sample.images
    assert bool(sample.references) == (name not in UNANSWERED)
  monkeypatch.chdir(tmp_path)
  assert load(name, None) == samples


@pytest.mark.parametrize("name", published.OFFICIAL)
def test_official_files_give_the_same_questions(name, tmp_path):
  expected = {(own.question, own.references, own.category) for own in load(name, published.write_hub(name, tmp_path))}
  files = tmp_path / "files"
  files.mkdir()
  published.OFFICIAL[name](files)
  samples = load(name, files)
  assert not [sample.error for sample in samples if sample.error]
  assert {(sample.question, sample.references, sample.category) for sample in samples} == expected
  assert len(samples) == COUNTS[name]
  if name == "scienceqa_img":
    assert [sample.id for sample in samples] == ["5", "4"]
  if name == "mmbench_en":
    assert samples[0].images == samples[1].images == (published.picture(2),)
  elif name != "scienceqa_img":
    assert all(isinstance(image, pathlib.Path) and image.is_file() for image in samples[0].images)


def test_other_owners_and_flat_directories(tmp_path, monkeypatch):
  published.write_parquet(
    tmp_path / "lmms-lab-encoder/textvqa/data/validation-00000-of-00001.parquet", published.TEXTVQA
  )
  published.write_parquet(tmp_path / "flat/validation-00000-of-00001.parquet", published.TEXTVQA)
  monkeypatch.chdir(tmp_path)
  assert load("textvqa", None) == load("textvqa", "flat") != []


def test_a_directory_of_several_tasks(tmp_path):
  """Each task's data is found by the task's name or by that of its repository, with or without the owner."""
  by_repository = load("pope", published.write_hub("pope", tmp_path))
  by_name = load("gqa", published.write_hub("gqa", tmp_path))
  assert load("pope", tmp_path) == by_repository
  (tmp_path / "lmms-lab/GQA").rename(tmp_path / "gqa")
  assert load("gqa", tmp_path) == by_name
  (tmp_path / "lmms-lab/POPE").rename(tmp_path / "POPE")
  assert load("pope", tmp_path) == by_repository
  documents = load("docvqa", published.write_hub("docvqa", tmp_path))
  (tmp_path / "lmms-lab/DocVQA").rename(tmp_path / "DocVQA")  # it has a configuration of the same name
  assert load("docvqa", tmp_path) == load("docvqa", tmp_path / "DocVQA") == documents
  (tmp_path / "textvqa").mkdir()
  with pytest.raises(UserError, match="textvqa has neither"):
    load("textvqa", tmp_path)


def test_files_of_the_hub_are_downloaded_when_they_are_reached(tmp_path, monkeypatch):
  for n in range(2):
    published.write_parquet(tmp_path / f"DocVQA/validation-0000{n}-of-00002-abc.parquet", published.DOCVQA)
  published.write_parquet(tmp_path / "InfographicVQA/validation-00000-of-00001.parquet", published.DOCVQA)
  asked = local_hub.serve(monkeypatch, tmp_path)
  (sample,) = load("docvqa", None, limit=1)
  assert sample.images == (published.picture(3),)
  first = ("DocVQA/validation-00000-of-00002-abc.parquet", "dataset")
  assert asked == [("lmms-lab/DocVQA", "dataset"), ("lmms-lab/DocVQA", *first)]
  assert len(load("docvqa", "someone/DocVQA")) == 2 and asked[3] == ("someone/DocVQA", *first)


def test_files_that_their_names_count_are_all_there(tmp_path, monkeypatch):
  """Also where the hub cannot be reached, and what was downloaded for a limit is found instead."""
  published.write_parquet(tmp_path / "data/test-00000-of-00003.parquet", published.CHARTQA)
  local_hub.serve(monkeypatch, tmp_path)
  monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *_, **__: 1 / 0)
  monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
  monkeypatch.chdir(tmp_path)
  for source, name in ((None, "lmms-lab/ChartQA"), (tmp_path, tmp_path)):
    with pytest.raises(UserError, match=f"^{name} has only 1 of the 3 files test-\\*-of-00003; download the others"):
      load("chartqa", source)


def test_ids_tell_two_questions_of_a_picture_apart(tmp_path):
  samples = load("mme_count", published.write_hub("mme_count", tmp_path))
  assert [sample.id for sample in samples] == ["count/0020.png", "count/0020.png#2"]
  assert samples[0].group == samples[1].group


def test_a_limit_reads_no_more(tmp_path):
  directory = published.write_hub("mme", tmp_path)
  assert load("mme", directory, limit=3) == load("mme", directory)[:3]


def test_records_are_streamed(tmp_path, monkeypatch):
  """Whoever takes one sample reads the beginning of the first of several files."""
  for n in range(2):
    published.write_parquet(tmp_path / f"data/test-0000{n}-of-00002.parquet", published.CHARTQA)
  assert len(load("chartqa", tmp_path)) == 4
  (tmp_path / "data/test-00001-of-00002.parquet").write_bytes(b"PAR1 no table")
  assert len(load("chartqa", tmp_path, limit=2)) == 2
  with pytest.raises(UserError, match="test-00001-of-00002.parquet: "):
    load("chartqa", tmp_path)


@pytest.fixture
def textvqa(tmp_path):
  """Returns `write(**changes)`: the directory of one record, with other values; a feature and value is another type."""

  def write(drop=(), **changes):
    features = {name: own for name, own in published.TEXTVQA["features"].items() if name not in drop}
    features |= {name: own[0] for name, own in changes.items() if isinstance(own, tuple)}
    values = {name: own[1] if isinstance(own, tuple) else own for name, own in changes.items()}
    row = {name: value for name, value in (published.TEXTVQA["rows"][0] | values).items() if name not in drop}
    rows = {"features": features, "rows": [row, row]}
    published.write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", rows)
    return tmp_path

  return write


def test_a_column_that_is_missing(textvqa):
  with pytest.raises(
    UserError, match="lacks the column ocr_tokens, which textvqa_ocr needs; it has image_id, question,"
  ):
    load("textvqa_ocr", textvqa(drop=("ocr_tokens",)))
  with pytest.raises(UserError, match="lacks the column category, which mme_count needs; it has image_id"):
    load("mme_count", textvqa(), split="validation")


@pytest.mark.parametrize(
  ("change", "error"),
  [
    (
      {"image": {"bytes": b"not a picture", "path": "a.png"}},
      "row 1: the picture of 13 bytes in the row: not an image of a supported format (JPEG, ",
    ),
    (
      {"image": {"bytes": published.picture(1)[:12], "path": "a.png"}},
      "row 1: the picture of 12 bytes in the row: damaged image: ",
    ),
    ({"image": None}, "row 1: the picture is missing"),
    ({"image": (published.NUMBER, 7)}, "row 1: the picture is neither bytes nor a path but of type int"),
    ({"image": (published.TEXT, "absent.png")}, "row 1: absent.png: No such file or directory"),
    ({"question": None}, "row 1: AttributeError: "),
    ({"question_id": None}, "row 1: TypeError: "),
  ],
)
def test_a_bad_row_is_an_error_of_its_sample(textvqa, change, error):
  first, second = load("textvqa", textvqa(**change))
  assert first.error.startswith(error) and first.images == () and second.error is not None
  assert first.id != second.id


def test_a_text_that_is_not_utf_8_is_an_error_of_its_sample(textvqa):
  (path,) = textvqa().rglob("*.parquet")
  table = parquet.read_table(path)
  text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"Why?", b"a\xff"]).buffers())
  for name, spoiled in (
    ("question", text),
    ("answers", pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), text)),
  ):
    parquet.write_table(table.set_column(table.schema.names.index(name), name, spoiled), path)
    first, second = load("textvqa", path.parents[1])
    assert first.error is None and second.error == f'row 2: "{name}" is not UTF-8: invalid start byte at byte 2'


def test_pictures_may_be_bytes_without_a_feature(textvqa):
  import datasets

  (sample, _) = load("textvqa", textvqa(image=(datasets.Value("binary"), published.picture(2))))
  assert sample.images == (published.picture(2),)


def test_a_split_without_answers_is_submitted(tmp_path):
  for name, submission in (
    ("vqav2_testdev", [{"question_id": 1000, "answer": "2 dogs"}]),
    ("docvqa_test", [{"questionId": 49153, "answer": "Two dogs."}]),
  ):
    samples = load(name, published.write_hub(name, tmp_path))
    scored = TASKS[name].scored(samples, ["Two dogs."])
    assert [own.score for own in scored] == [None] and TASKS[name].values(scored) == {}
    write_submission(TASKS[name], scored, tmp_path / "answers.json")
    assert json.loads((tmp_path / "answers.json").read_text()) == submission
  with pytest.raises(UserError, match="cannot write the submission .*answers.json: No such file or directory"):
    write_submission(TASKS["docvqa_test"], scored, tmp_path / "absent/answers.json")


def test_a_truncated_file(tmp_path):
  path = published.write_hub("pope", tmp_path) / "data/test-00000-of-00001.parquet"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(UserError, match="lmms-lab/POPE/data/test-00000-of-00001.parquet: .*[Pp]arquet") as error:
    load("pope", path.parent.parent)
  assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path, monkeypatch):
  with pytest.raises(UserError, match="no task 'vqa'; tasks: vqav2, vqav2_testdev, textvqa"):
    find_task("vqa")
  directory = published.write_hub("docvqa", tmp_path)
  with pytest.raises(
    UserError,
    match="neither DocVQA/test-\\*.parquet nor official files; it has DocVQA/validation-00000-of-00001.parquet",
  ):
    load("docvqa_test", directory)
  with pytest.raises(UserError, match="is neither a directory nor an id on the hub, such as lmms-lab/DocVQA"):
    load("docvqa", tmp_path / "absent")
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="some/dataset: .* it cannot be downloaded from the Hugging Face hub"):
    load("docvqa", "some/dataset")


def test_official_files_that_are_not_as_expected(tmp_path):
  published.official_scienceqa(tmp_path)
  with pytest.raises(UserError, match="files lack 'validation'"):
    load("scienceqa_img", tmp_path, split="validation")
  (tmp_path / "problems.json").write_text("{")
  with pytest.raises(UserError, match="problems.json cannot be read: Expecting property name"):
    load("scienceqa_img", tmp_path)
  (tmp_path / "pid_splits.json").unlink()
  with pytest.raises(
    UserError, match="neither ScienceQA-IMG/test-\\*.parquet nor official files; it has no parquet files"
  ):
    load("scienceqa_img", tmp_path)


def test_chinese_questions_beside_english_ones(tmp_path):
  published.official_mmbench(tmp_path)
  (path,) = tmp_path.glob("*.tsv")
  english = load("mmbench_en", tmp_path)
  chinese = path.read_text(encoding="utf-8").replace("What is", "什么是")
  path.with_name("mmbench_dev_cn_20231003.tsv").write_text(chinese, encoding="utf-8")
  path.rename(path.with_name("mmbench_dev_en_20231003.tsv"))
  assert load("mmbench_en", tmp_path) == english
  (tmp_path / "mmbench_dev_en_20231003.tsv").unlink()
  with pytest.raises(UserError, match="no \\*.tsv of the split dev"):
    load("mmbench_en", tmp_path)


def test_a_category_that_is_missing(tmp_path):
  published.official_pope(tmp_path)
  (tmp_path / "coco_pope_popular.json").unlink()
  with pytest.raises(UserError, match="lacks coco_pope_popular.json; the scores of POPE are means of its three"):
    load("pope", tmp_path)


def test_an_official_picture_that_is_missing(tmp_path):
  published.official_pope(tmp_path)
  (tmp_path / "val2014/COCO_val2014_000000310196.jpg").unlink()
  samples = load("pope", tmp_path)
  assert all(
    sample.error.endswith("val2014/COCO_val2014_000000310196.jpg: No such file or directory") for sample in samples
  )


def test_no_records(tmp_path):
  published.write_parquet(tmp_path / "data/test-0.parquet", {"features": published.CHARTQA["features"], "rows": []})
  with pytest.raises(UserError, match="has no records of ChartQA test"):
    load("chartqa", tmp_path)
