"""Questions and scores against lmms-eval's own code on the same records, and where the two differ on purpose."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import published
import pytest
from datasets import List

from experiments.evaluate.tasks import TASKS

YAML = {
  "vqav2": "vqav2/vqav2_val",
  "textvqa": "textvqa/textvqa_val",
  "textvqa_ocr": "textvqa/textvqa_val",
  "gqa": "gqa/gqa",
  "scienceqa_img": "scienceqa/scienceqa_img",
  "mme": "mme/mme",
  "pope": "pope/pope",
  "chartqa": "chartqa/chartqa",
  "docvqa": "docvqa/docvqa_val",
  "nocaps": "nocaps/nocaps_val",
  "flickr30k": "flickr30k/flickr30k_test",
  "mmbench_en": "mmbench/mmbench_en_dev_static",
  "seed_image": "seedbench/seedbench",
  "mmmu": "mmmu/mmmu_val",
}
VQA = (
  "Yes",
  "yes.",
  "2",
  "two",
  "the 2",
  "3",
  "no",
  "dont",
  "1,000",
  "red, blue",
  "red,blue",
  "Dakota's",
  "DAKOTA",
  "",
)
# Answers on which both agree; every record gets all.
AGREE = {
  "vqav2": VQA,
  "textvqa": VQA,
  "gqa": ("no", "No.", "yes", "no way", ""),
  "scienceqa_img": ("A", "B", "C", "B. stronger", "C. the same", "D", "stronger", ""),
  "mme": ("Yes", "no.", "Yes, it is", "Not at all", "maybe", "I think so", ""),
  "pope": ("Yes", "no", "No", "yes"),
  "chartqa": ("14", "14.7", "14.71", "13.3", "1400%", "fourteen", "2010", "2100", "2200", ""),
  "docvqa": ("0.28", "0.2", "0.29", "2", "", " 0.28 "),
  "mmbench_en": ("A", "B.", "C", "(A)", "A: up", "up", "It is Green", "left and up", "The answer is C", ""),
  "seed_image": ("A", "A.", "A. One", "B", "One", "", "(C)"),
  "mmmu": (
    "B",
    "It is (B), not (A)",
    "(A) or (B)",
    "Answer: C",
    "A B C",
    "B. neither",
    "I say that it is neither of the two",
  ),
}
OPEN = ("1,200.5", "1200.50", "The answer is 1,200.50 tons", "so 1.2005e3", "about 1200", "x = 1200.5", "none", "")
# Task, changes of its first record, answer, our score, lmms-eval's score: the reasons are in docs/evaluation.md.
DIFFER = [
  ("vqav2", {"answers": [{"answer": "yes", "answer_id": n} for n in range(10)]}, "Yes.", 0, 1),
  ("gqa", {}, "no!", 0, 1),
  ("scienceqa_img", {}, "b", 0, 1),
  ("scienceqa_img", {}, "B.", 0, 1),
  ("scienceqa_img", {}, "The answer is B.", 1, 0),
  ("mme", {}, "y", 0, 1),
  ("pope", {}, "Yes.", 1, 0),
  ("pope", {}, "Yes, there is", 1, 0),
  ("chartqa", {"answer": "blue"}, "blue ", 1, 0),
  ("docvqa", {}, "0.99", 0, 0.5),
  ("mmbench_en", {}, "A!", 0, 1),
  ("mmbench_en", {}, "A or B", 0, 1),
  ("seed_image", {}, "Apple", 0, 1),
  ("seed_image", {}, "a", 0, 1),
  ("seed_image", {}, "(A)", 1, 0),
  ("mmmu", {"question_type": "open", "options": "[]", "answer": "['24/7', '3.429']"}, "24/7", 1, 0),
]
# Answers to all records, for scores that are no means, with lmms-eval's names and ours.
POINTS = {"mme_perception_score": "points: perception", "mme_cognition_score": "points: cognition"}
CORPUS = {"Bleu_4": "BLEU-4", "Bleu_1": "BLEU-1", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
BABIES = ("A baby stands in front of a house.", "the baby isn't sleeping outside")
SETS = [
  ("mme", ("yes", "no", "yes", "yes", "no", "yes"), POINTS),
  ("mme", ("no", "yes", "no", "no", "yes", "no"), POINTS),
  ("mmbench_en", ("A", "B", "C"), {"gpt_eval_score": "accuracy"}),
  ("mmbench_en", ("A", "A", "C"), {"gpt_eval_score": "accuracy"}),
  ("mmbench_en", ("It is up", "(B)", "A or B"), {"gpt_eval_score": "accuracy"}),
]
SETS += [
  ("nocaps", BABIES, {f"nocaps_{name}": own for name, own in CORPUS.items()}),
  ("flickr30k", ("two men look at a yard",), {f"flickr_{name}": own for name, own in CORPUS.items()}),
]
POPE_ANSWERS = {"adversarial": "yynnynyn", "popular": "yyyyyyny", "random": "nnnnynnn"}


VQA_PARTS = [*" .,'-/?!\n", "a ", "The ", "two ", "none ", "dont ", "1", "000", "Cat", "cat "]
LETTER_PARTS = ["A ", "B ", "(A)", "(C)", "B.", "C,", " ", "the answer is ", "both", "A.", ": "]
NUMBER_PARTS = ["1,200", "0.5", "1e3", " ", "is ", "so ", "answer ", "= ", "tons", ".", "\n", "-2", "Paris ", "x"]


def random_documents(kind):
  """Records and answers of a kind, of parts in random order."""
  rng = np.random.default_rng(0)

  def text(parts, length):
    return "".join(rng.choice(parts, rng.integers(1, length)))

  if kind == "mmmu letters":
    ends = ("B", "(C)", "B.", " neither of the two as I see it")
    doc = documents("mmmu")[0]
    return [(doc, [text(LETTER_PARTS, 6) + str(rng.choice(ends)) for _ in range(100)])]
  if kind == "mmmu numbers":
    doc = documents("mmmu")[1]
    wanted = ("1200", "0.5", "1000", "-2", "Paris", "x", "tons 1")
    return [(doc | {"answer": own}, [text(NUMBER_PARTS, 9) for _ in range(60)]) for own in wanted]
  docs = []
  for _ in range(30):
    words = [text(VQA_PARTS, 5) for _ in range(4)]
    given = [str(rng.choice([word, f"{word}.", f"The {word}", word.upper(), f"{word} ,"])) for word in words * 5][:10]
    held = given if kind == "textvqa" else [{"answer": own, "answer_id": n} for n, own in enumerate(given)]
    docs.append((documents(kind)[0] | {"answers": held}, [*given, *words]))
  return docs


RANDOM = {"vqav2": "vqav2", "textvqa": "textvqa", "mmmu letters": "mmmu", "mmmu numbers": "mmmu"}


def documents(name):
  """A task's records without their pictures."""
  (table, *_) = published.HUB[name][1].values()
  held = {key for key, own in table["features"].items() if own in (published.PICTURE, List(published.PICTURE))}
  rows = [{key: None if key in held else value for key, value in row.items()} for row in table["rows"]]
  return [row | {"image": None} for row in rows if name != "seed_image" or row["data_type"] == "image"]


def single_documents(name):
  """Those that are scored alone."""
  return [doc for doc in documents(name) if doc.get("index", 0) < 1_000_000]


def answers_to(name, doc):
  return OPEN if name == "mmmu" and doc["options"] == "[]" else AGREE.get(name, ())


def pope_documents(category):
  (doc, *_) = (doc for doc in documents("pope") if doc["category"] == category)
  return [doc | {"question_id": str(n), "answer": "yes" if n % 3 else "no"} for n in range(8)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
  """What lmms-eval makes of everything here, in one process."""
  asked = {}
  for name, yaml in YAML.items():
    docs = single_documents(name)
    asked[name] = {"yaml": yaml, "docs": docs, "answers": [answers_to(name, doc) for doc in docs]}
  asked["textvqa_ocr"]["kwargs"] = {"ocr": True}
  for number, (name, change, answer, *_) in enumerate(DIFFER):
    asked[f"differ {number}"] = {"yaml": YAML[name], "docs": [documents(name)[0] | change], "answers": [[answer]]}
  for number, (name, answers, names) in enumerate(SETS):
    given = {"docs": documents(name), "answers": [[answer] for answer in answers], "sets": list(names)}
    asked[f"set {number}"] = {"yaml": YAML[name]} | given
  for kind, name in RANDOM.items():
    docs, answers = zip(*random_documents(kind), strict=True)
    asked[f"random {kind}"] = {"yaml": YAML[name], "docs": docs, "answers": answers}
  for category, letters in POPE_ANSWERS.items():
    given = {"docs": pope_documents(category), "answers": [[{"y": "yes", "n": "no"}[letter]] for letter in letters]}
    asked[category] = {"yaml": YAML["pope"], "sets": ["pope_f1_score", "pope_accuracy", "pope_precision"]} | given
  directory = tmp_path_factory.mktemp("lmms_eval")
  environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
  command = [sys.executable, pathlib.Path(__file__).with_name("lmms_eval_side.py")]
  done = subprocess.run(
    command, input=json.dumps(asked), env=environment, cwd=directory, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((directory / "out.json").read_text())


# lmms-eval joins MMBench's parts with spaces, an introduction and an empty line, where LLaVA has a line for each.
OTHER_QUESTIONS = {
  "mmbench_en": lambda text: (
    text.replace("Look twice. What", "Look twice.\nWhat")
    .replace(" There are several options:\n", "\n")
    .replace("\n\nAnswer", "\nAnswer")
  )
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", YAML)
def test_questions(name, theirs):
  same = OTHER_QUESTIONS.get(name, str)
  ours = [TASKS[name].sample(doc).question for doc in single_documents(name)]
  assert ours == [same(text) for text in theirs[name]["prompts"]]
  assert (name in OTHER_QUESTIONS) == (ours != theirs[name]["prompts"])


# lmms-eval gives no limit to TextVQA and SEED-Bench; LLaVA's scripts have 128, and answers here are letters.
OTHER_LIMITS = {"textvqa": None, "textvqa_ocr": None, "seed_image": None, "mmbench_en": 1024}


@pytest.mark.parametrize("name", YAML)
def test_limits_of_answers(name, theirs):
  assert theirs[name]["max_new_tokens"] == OTHER_LIMITS.get(name, TASKS[name].max_new_tokens)


@pytest.mark.parametrize("name", AGREE)
def test_scores(name, theirs):
  task = TASKS[name]
  for doc, scores in zip(single_documents(name), theirs[name]["scores"], strict=True):
    answers = answers_to(name, doc)
    ours = {answer: task.score(answer, task.sample(doc)) for answer in answers}
    assert ours == pytest.approx(dict(zip(answers, scores, strict=True))) and len(set(scores)) > 1


@pytest.mark.parametrize("kind", RANDOM)
def test_random_answers(kind, theirs):
  task, seen = TASKS[RANDOM[kind]], set()
  for (doc, answers), scores in zip(random_documents(kind), theirs[f"random {kind}"]["scores"], strict=True):
    ours = [task.score(answer, task.sample(doc)) for answer in answers]
    assert ours == pytest.approx(scores), [(doc["answer"], own) for own in zip(answers, ours, scores, strict=True)]
    seen.update(scores)
  assert len(seen) > 1


@pytest.mark.parametrize("number", range(len(DIFFER)))
def test_differences(number, theirs):
  name, change, answer, ours, other = DIFFER[number]
  assert TASKS[name].score(answer, TASKS[name].sample(documents(name)[0] | change)) == pytest.approx(ours)
  assert theirs[f"differ {number}"]["scores"] == [[pytest.approx(other)]]


@pytest.mark.parametrize("number", range(len(SETS)))
def test_scores_of_sets(number, theirs):
  name, answers, names = SETS[number]
  task, other = TASKS[name], theirs[f"set {number}"]["sets"]
  values = task.values(task.scored([task.sample(doc) for doc in documents(name)], answers))
  scale = 100 if name in ("nocaps", "flickr30k") else 1
  assert {own: values[own] for own in names.values()} == pytest.approx(
    {names[key]: scale * other[key] for key in names}
  )


def test_pope_averages_what_lmms_eval_pools(theirs):
  task = TASKS["pope"]
  docs = [doc for category in POPE_ANSWERS for doc in pope_documents(category)]
  answers = [{"y": "yes", "n": "no"}[letter] for letters in POPE_ANSWERS.values() for letter in letters]
  values = task.values(task.scored([task.sample(doc) for doc in docs], answers))
  own = {category: theirs[category]["sets"] for category in POPE_ANSWERS}
  for category in POPE_ANSWERS:
    assert values[f"F1: {category}"] == pytest.approx(100 * own[category]["pope_f1_score"])
  for name, other in (("F1", "pope_f1_score"), ("accuracy", "pope_accuracy"), ("precision", "pope_precision")):
    assert values[name] == pytest.approx(100 * sum(own[category][other] for category in own) / 3)
