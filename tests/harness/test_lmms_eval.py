"""lmms-eval on built-in and local tasks, without a network: its own command, ours, and our own count of right answers."""

import csv
import functools
import io
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import datasets
import jax.numpy as jnp
import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest

from himap_jax import GenerationConfig, InputConfig, UserError, checkpoint, generate
from himap_jax.engine.batching import Batcher, ImageBucket
from himap_jax.engine.engine import Engine
from himap_jax.harness import responder as responder_module
from himap_jax.harness.responder import Continuation, Question, Responder, pictures_of
from himap_jax.harness.settings import Settings
from himap_jax.run.progress import Progress

QUESTIONS = ("what is it?", "which colour has it?", "where is the dog?", "who wrote this?")
AFTER = "\nAnswer the question using a single word or phrase."
CHOICES = ("cat", "a dog", "green", "no")
SCHEDULE = ("himap", (2, 4), (8, 4))
ARGUMENTS = "method=himap,prune_layers=2:4,keep=8:4,dtype=float32,max_new_tokens=16"
CHOICE_TASK = """
task: tiny_choices
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
RUN_MODULES = """
import json, runpy, sys, yaml
class Loader(yaml.CFullLoader):  # every command reads lmms-eval's 1900 tasks, slowly with the one in Python
  def __init__(self, stream):
    super().__init__(stream)
    self.name = getattr(stream, "name", None)
yaml.FullLoader = yaml.loader.FullLoader = Loader
for sys.argv in json.loads(sys.argv[1]):
  try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
  except SystemExit as end:
    if end.code:
      raise
"""
CHOICE_UTILS = "def doc_to_visual(doc):\n  return [doc['image'].convert('RGB')]\n"


class Results(NamedTuple):
  """Scores and samples of lmms-eval's command, the answers they should have, and the table and text of ours."""

  scores: dict
  samples: dict
  texts: list
  rows: list
  printed: str


@pytest.fixture(scope="module")
def directory(checkpoints):
  return checkpoints("clip_mha").directory


@pytest.fixture(scope="module")
def loaded(directory, tmp_path_factory):
  return checkpoint.load(str(directory), dtype=jnp.float32, cache_dir=tmp_path_factory.mktemp("cache"))


def write_set(path, rows, images, **features):
  """A parquet file as the hub has it, with pictures in the rows."""
  columns = {name: [row[name] for row in rows] for name in rows[0]}
  kinds = {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()} | features
  own = datasets.Dataset.from_dict(columns | {"image": list(images)}, datasets.Features(kinds))
  path.parent.mkdir(parents=True, exist_ok=True)
  own.to_parquet(path)


@pytest.fixture(scope="module")
def results(directory, loaded, images, tmp_path_factory):
  work = tmp_path_factory.mktemp("lmms_eval")
  schedule = loaded.schedule(*SCHEDULE)
  asked = [question.capitalize() + AFTER for question in QUESTIONS]
  answers = generate(
    loaded, images, asked, schedule=schedule, generation=GenerationConfig(16), inputs=InputConfig(batch_size=2)
  )
  texts = [answer.text.strip() for answer in answers]
  said = [text if place % 2 else "nothing of the kind" for place, text in enumerate(texts)]
  rows = [
    {"question_id": place, "question": question, "answers": [own] * 10, "ocr_tokens": []}
    for place, (question, own) in enumerate(zip(QUESTIONS, said, strict=True))
  ]
  kinds = {"question_id": datasets.Value("int32")}
  kinds |= {name: datasets.List(datasets.Value("string")) for name in ("answers", "ocr_tokens")}
  textvqa = work / "lmms-lab-encoder/textvqa"
  write_set(textvqa / "data/validation-00000-of-00001.parquet", rows, images, **kinds)
  (textvqa / "README.md").write_text(
    "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: validation\n    path: data/validation-*\n---\n"
  )
  best = likeliest_choices(loaded, images, schedule)
  targets = [own if place else (own + 1) % len(CHOICES) for place, own in enumerate(best)]
  rows = [{"question": q, "choices": CHOICES, "answer": own} for q, own in zip(QUESTIONS, targets, strict=True)]
  kinds = {"choices": datasets.List(datasets.Value("string")), "answer": datasets.Value("int32")}
  write_set(work / "choices.parquet", rows, images, **kinds)
  (work / "tasks").mkdir()
  (work / "tasks/tiny_choices.yaml").write_text(CHOICE_TASK.format(file=work / "choices.parquet"))
  (work / "tasks/utils.py").write_text(CHOICE_UTILS)
  harness = ["lmms_eval", "--model", "himap_jax", "--tasks", "textvqa_val,tiny_choices", "--include_path", "tasks"]
  harness += ["--model_args", f"checkpoint={directory},{ARGUMENTS}", "--batch_size", "2", "--log_samples"]
  ours = ["experiments.evaluate", "--tasks=lmms:textvqa_val,lmms:tiny_choices", "--settings=himap@2/4:8/4"]
  ours += [f"--checkpoint={directory}", "--dtype=float32", "--batch_size=2", "--include_path=tasks"]
  ours += ["--max_new_tokens=16", "--workdir=evaluate_work", "--output=evaluate_output"]
  printed = run_modules(work, [*harness, "--output_path", "results"], ours)
  (file,) = (work / "results").rglob("*_results.json")
  samples = {
    task: [json.loads(line) for line in next(file.parent.glob(f"*_samples_{task}.jsonl")).read_text().splitlines()]
    for task in ("textvqa_val", "tiny_choices")
  }
  with open(work / "evaluate_output/evaluate.csv", newline="") as table:
    rows = list(csv.DictReader(table))
  return Results(json.loads(file.read_text())["results"], samples, texts, rows, printed)


def run_modules(work, *commands):
  """Runs commands of modules one after another in one process, since lmms-eval takes long to import."""
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2]), "HF_HOME": str(work / "hf")}
  command = [sys.executable, "-c", RUN_MODULES, json.dumps([list(map(str, own)) for own in commands])]
  run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
  assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-3000:]
  return run.stdout


def likeliest_choices(loaded, images, schedule):
  """By the logits of every token of a choice after the pruned prompt, whose kept tokens are those of the prompt alone."""
  processor, tokenizer = loaded.prompts(), loaded.processor.tokenizer
  batcher = Batcher(512, processor.blank, [ImageBucket(1, 16)], buckets=(128,))
  examples = [processor.prepare([image], question) for image, question in zip(images, QUESTIONS, strict=True)]
  bucket = batcher.bucket(examples[-1])
  inputs = batcher.pack(examples, bucket=bucket, batch_size=4)
  tokens = [tokenizer(f" {choice}", add_special_tokens=False)["input_ids"] for choice in CHOICES]
  scores = Engine(loaded.model, schedule).score(inputs, range(4), [tokens] * 4)
  means = np.array([[s.log_probability / len(t) for s, t in zip(own, tokens, strict=True)] for own in scores])
  assert np.diff(np.sort(means, axis=1)[:, -2:]).min() > 1e-3
  return means.argmax(axis=1).tolist()


def test_answers_are_generate_s(results):
  scores, samples, texts, *_ = results
  assert [sample["filtered_resps"] for sample in samples["textvqa_val"]] == texts
  assert scores["textvqa_val"]["exact_match,none"] == 0.5


def test_choices_are_the_likeliest(results):
  scores, samples, *_ = results
  assert scores["tiny_choices"]["acc,none"] == 0.75
  losses = np.array([[float(loss) for loss, _ in sample["filtered_resps"]] for sample in samples["tiny_choices"]])
  assert losses.shape == (4, 4) and (losses > 0).all()


def test_our_command_gives_the_same_scores(results):
  text, choices = results.rows
  assert float(text["score"]) == results.scores["textvqa_val"]["exact_match,none"] and text["questions"] == "4"
  assert float(text["score_low"]) < 0.5 < float(text["score_high"]) and 0 < float(text["flops"]) < 1
  assert float(choices["score"]) == results.scores["tiny_choices"]["acc,none"] and choices["setting"] == "himap@2/4:8/4"
  for sample in results.samples["textvqa_val"]:
    assert repr(sample["filtered_resps"]) in results.printed


class Counted(Progress):
  """Remembers the total, what has been counted, and whether it has ended."""

  def __init__(self, made, total, *names):
    super().__init__(total, *names, shown=False)
    self.total, self.num_done, self.has_ended = total, 0, False
    made.append(self)

  def __exit__(self, *exception):
    super().__exit__(*exception)
    self.has_ended = True

  def update(self, count=1):
    self.num_done += count


def test_a_request_that_cannot_be_answered_leaves_the_others(loaded, images, monkeypatch):
  """Damaged pictures, one without pixels, a continuation without a token, and a prompt that places its picture itself."""
  made = []
  monkeypatch.setattr(responder_module, "Progress", functools.partial(Counted, made))
  responder = Responder(loaded, loaded.prompts(), loaded.schedule("none"), Settings(prompt_buckets=(64,)))
  file = io.BytesIO()
  images[0].resize((200, 200)).save(file, "JPEG")
  damaged = PIL.Image.open(io.BytesIO(file.getvalue()[:800]))

  def continuation(place, text, picture, target):
    return Continuation(place, text, lambda: [picture], target, (text, place))

  asked = [
    continuation(0, "What?", damaged, "yes"),
    continuation(1, "What?", images[0], ""),
    continuation(2, "What is <image> here?", images[0], "yes"),
    continuation(3, "What?", images[0], "yes"),
  ]
  found = {own.place: loss for own, loss in responder.losses(asked)}
  assert sorted(found) == [2, 3] and all(loss.value > 0 for loss in found.values())
  generation = GenerationConfig(2, ignore_eos=True)
  questions = [
    Question(place, "What?", lambda own=own: [own], generation)
    for place, own in enumerate((damaged, images[0], PIL.Image.new("RGB", (0, 0))))
  ]
  questions.append(Question(3, "What?", lambda: [PIL.Image.open(io.BytesIO(b"no picture"))], generation))
  assert [question.place for question, _ in responder.answers(questions)] == [1]
  assert [(own.total, own.num_done, own.has_ended) for own in made] == [(4, 4, True), (4, 4, True)]
  transparent = PIL.Image.new("RGBA", (8, 4), (0, 0, 0, 0))
  transparent.getexif()[PIL.ExifTags.Base.Orientation] = 6
  file = io.BytesIO()
  transparent.save(file, "PNG", exif=transparent.getexif())
  own = Question(0, "What?", lambda: [PIL.Image.open(file)], generation)
  (as_in_a_run,) = pictures_of(own)
  assert as_in_a_run.size == (4, 8) and as_in_a_run.getpixel((0, 0)) == (255, 255, 255)

  with monkeypatch.context() as patch:

    def refuse(self, inputs):
      raise UserError("a prompt of 80 tokens needs more of a device's memory")

    patch.setattr(Engine, "prefill_rows", refuse)
    assert list(responder.answers(questions[1:2])) == [] and made[-1].num_done == 1

  def failing(self, batches):
    next(iter(batches))
    raise RuntimeError("out of memory")

  monkeypatch.setattr(Engine, "answer", failing)
  with pytest.raises(RuntimeError, match="out of memory"):
    list(responder.answers(questions))
  assert made[-1].has_ended


def test_choices_that_are_scored_later_are_read_over_the_same_random_tokens(loaded, images):
  schedule = loaded.schedule("random", (1,), (3,))
  responder = Responder(loaded, loaded.prompts(), schedule, Settings(method="random", prompt_buckets=(64,)))
  choices = [
    Continuation(place, "What?", lambda: [images[0]], f" {choice}", ("What?", 0))
    for place, choice in enumerate(CHOICES)
  ]
  losses, later = ({own.place: loss.value for own, loss in responder.losses(own)} for own in (choices, choices[1:]))
  assert later == pytest.approx({place: losses[place] for place in (1, 2, 3)})


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"methd": "himap"}, "unknown methd; known: checkpoint, method"),
    ({"keep": "many"}, "keep=many cannot be read"),
    ({"restore": "1"}, "restore=1 cannot be read"),
    ({"dtype": "float8"}, "dtype=float8; known: bfloat16, float32"),
    ({"image_aspect_ratio": "wide"}, "image_aspect_ratio=wide; known: checkpoint, pad"),
    ({"method": "magic"}, "magic"),
  ],
)
def test_unusable_settings(given, message):
  with pytest.raises(UserError, match=message):
    Settings.of(given)


def test_settings_are_read_from_text():
  settings = Settings.of({"keep": "50%:12.5%", "prune_layers": "2:8", "batch_size": "4", "max_image_tokens": "256"})
  assert settings.keep == (0.5, 0.125) and settings.prune_layers == (2, 8)
  assert (settings.batch_size, settings.max_image_tokens) == (4, 256)
  assert Settings.of({"keep": 72, "prune_layers": 2}).keep == (72,)
  for value in ("True", "true", True):
    assert Settings.of({"restore": value}).pruning.restore is True
  assert Settings.of({"restore": "False"}).pruning.restore is False
