"""Metrics against the rules' own examples, slow versions, and the libraries of their authors."""

import itertools
import sys

import numpy as np
import pytest

from experiments.evaluate.metrics import captions, choice, mmmu, text, vqa, yes_no
from himap_jax.errors import UserError

WORDS = ("yes", "no", "two", "2", "a dog", "dog", "Dog.", "don't", "dont", "red,blue", "1,000", "1.5")


def slow_vqa(answer, references):
  """One person after another is left out."""
  scores = []
  for person in range(len(references)):
    others = [reference for other, reference in enumerate(references) if other != person]
    scores.append(min(1, others.count(answer) / 3))
  return sum(scores) / len(scores)


def test_vqa_accuracy_leaves_one_person_out():
  """The values of the published rule: 0, 0.3, 0.6, 0.9, then 1."""
  for matches, score in enumerate((0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1)):
    assert vqa.accuracy("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == pytest.approx(score)
  rng = np.random.default_rng(0)
  for _ in range(200):
    answer, *references = rng.choice(WORDS, 11).tolist()
    normal = [vqa.normalise(word) for word in (answer, *references)]
    assert vqa.accuracy(answer, references) == pytest.approx(slow_vqa(normal[0], normal[1:]))


def test_vqa_answers_are_normalised_only_where_people_differ():
  assert vqa.accuracy("Yes.", ["yes"] * 10) == 0
  assert vqa.accuracy("Yes.", ["yes"] * 9 + ["no"]) == 1
  assert vqa.accuracy(" yes\n", ["yes"] * 10) == 1
  assert vqa.textvqa_accuracy("Yes.", ["yes"] * 10) == 1


@pytest.mark.parametrize(
  ("answer", "normal"),
  [
    ("The Two dogs", "2 dogs"),
    ("dont", "don't"),
    ("couldnt've", "couldn't've"),
    ("somebody'd", "somebodyd"),
    ("lets", "lets"),
    ("1,000", "1000"),
    ("red,blue", "red blue"),
    ("red, blue", "red blue"),
    ("3.5", "3.5"),
    ("u.s.", "us"),
    ("black/white", "black white"),
    ("none", "0"),
  ],
)
def test_vqa_normalisation(answer, normal):
  assert vqa.normalise(answer) == normal


def test_vqa_cleaning_for_submissions():
  assert vqa.clean("The dog's, really?") == "dog 's really"
  assert vqa.clean("a\tcat\n") == "cat"
  assert len(vqa.CONTRACTIONS) == 118 and vqa.CONTRACTIONS["itll"] == "it'll"  # 120 less two that change nothing


@pytest.mark.parametrize(
  ("answer", "reference", "score"),
  [
    ("104.9", "100", 1),
    ("105", "100", 1),
    ("105.1", "100", 0),
    ("95", "100", 1),
    ("-95", "-100", 1),
    ("-95", "100", 0),
    ("10%", "0.1", 1),
    ("10%", "10", 0),
    ("0", "0", 1),
    ("0.01", "0", 0),
    ("0.0", "0", 0),
    ("Blue", "blue", 1),
    ("blue.", "blue", 0),
    ("2010", "2015", 1),
    ("nine", "9", 0),
  ],
)
def test_relaxed_accuracy(answer, reference, score):
  assert text.relaxed_match(answer, reference) == score


def slow_distance(one, other):
  if not one or not other:
    return len(one or other)
  if one[-1] == other[-1]:
    return slow_distance(one[:-1], other[:-1])
  return 1 + min(slow_distance(one[:-1], other), slow_distance(one, other[:-1]), slow_distance(one[:-1], other[:-1]))


def test_anls_of_the_nearest_reference():
  rng = np.random.default_rng(1)
  for _ in range(60):
    words = ["".join(rng.choice(list("ab c"), rng.integers(1, 6))) for _ in range(4)]
    answer, *references = (" ".join(word.split()) for word in words)
    if not all((answer, *references)):
      continue
    parts = [slow_distance(answer, own) / max(len(answer), len(own)) for own in references]
    assert text.anls(answer.upper(), references) == pytest.approx(max(1 - part if part < 0.5 else 0 for part in parts))
  assert text.anls("ab", ["ax"]) == 0  # At exactly half the rule gives nothing.
  assert text.anls("Hello  World", ["hello world"]) == 1
  assert text.anls("", ["hello"]) == 0


def test_gqa_and_direct_answers():
  assert [text.gqa_match(answer, "yes") for answer in ("yes", "Yes.", "yes!", "yes, it is")] == [1, 1, 0, 0]
  assert [text.direct_answer("a", "a" * n + "b" * (10 - n)) for n in range(5)] == [0, 1 / 3, 2 / 3, 1, 1]


def test_mme_points():
  """Two pictures: one with both answers right, one with one of two. The third lacks an answer and is left out."""
  rows = [("count", "1.png", 1), ("count", "1.png", 1), ("count", "2.png", 0), ("count", "2.png", 1), ("count", "3", 1)]
  assert yes_no.mme_scores([*rows, ("OCR", "1.png", 0), ("OCR", "1.png", 0)]) == {"count": 75 + 50, "OCR": 0}
  assert yes_no.mme_scores([("count", "1.png", 1)]) == {}
  answers = ("Yes", " yes, it is", "No.", "not at all", "I think yes", "y", "", "Answer: no", "A no")
  assert [yes_no.mme_answer(own) for own in answers] == [
    "yes", "yes", "no", "no", "other", "other", "other", "other", "no",
  ]  # fmt: skip
  assert len(yes_no.PERCEPTION) == 10 and len(yes_no.COGNITION) == 4


def test_pope_scores():
  answers = ("Yes", "No.", "no, never", "There is not one", "I see one. No other", "Nothing", "It is. not so", "Nobody")
  parsed = [yes_no.pope_answer(answer) for answer in answers]
  assert parsed == ["yes", "no", "no", "no", "yes", "yes", "yes", "yes"]
  rng = np.random.default_rng(2)
  given, wanted = (rng.choice(["yes", "no"], 50).tolist() for _ in range(2))
  hits, false, missed = (
    sum(pair == own for pair in zip(given, wanted, strict=True)) for own in (("yes",) * 2, ("yes", "no"), ("no", "yes"))
  )
  precision, recall = hits / (hits + false), hits / (hits + missed)
  scores = yes_no.pope_scores(given, wanted)
  assert scores["F1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))
  assert (scores["precision"], scores["recall"]) == pytest.approx((100 * precision, 100 * recall))
  assert scores["accuracy"] == pytest.approx(100 * (50 - false - missed) / 50)
  assert yes_no.pope_scores(["no"], ["no"]) == {
    "F1": 0, "accuracy": 100, "precision": 0, "recall": 0, "share of yes": 0,
  }  # fmt: skip


OPTIONS = {"A": "a red hat", "B": "blue", "C": "none of them"}


@pytest.mark.parametrize(
  ("answer", "scienceqa", "leading", "mmbench"),
  [
    ("B", "B", "B", "B"),
    ("B.", None, "B", "B"),
    ("B. blue", "B", "B", "B"),
    ("(B) blue", None, "B", "B"),
    ("The answer is B.", "B", None, "B"),
    ("The answer is B. Or: The answer is C.", None, None, None),
    ("E", None, None, "E"),
    ("D", None, None, "D"),
    ("blue", None, None, "B"),
    ("Blue, I think", None, None, "B"),
    ("A hat that is blue", None, "A", "B"),
    ("Apple", None, None, None),
    ("b", None, None, None),
    ("", None, None, None),
  ],
)
def test_letters(answer, scienceqa, leading, mmbench):
  assert choice.scienceqa_letter(answer, OPTIONS) == scienceqa
  assert choice.leading_letter(answer, OPTIONS) == leading
  assert choice.mmbench_letter(answer, OPTIONS) == mmbench


def test_the_nearest_option():
  given = {"C": "C", "A red cap": "A", "the blues": "B", "E": "B", "none of these": "C"}
  assert {answer: choice.nearest_letter(answer, OPTIONS) for answer in given} == given


def test_mmmu_letters():
  given = {
    "(A) or rather (C)": "C",
    "B": "B",
    "It is B or C": "C",
    "Option A. No: B.": "B",
    "I would say that it is none of them here": "C",
  }
  assert {answer: mmmu.chosen_letter(answer, OPTIONS, seed="") for answer in given} == given
  drawn = [mmmu.chosen_letter("?", OPTIONS, seed=str(seed)) for seed in range(300)]
  assert drawn == [mmmu.chosen_letter("?", OPTIONS, seed=str(seed)) for seed in range(300)]
  assert all(70 < drawn.count(letter) < 130 for letter in OPTIONS)


@pytest.mark.parametrize(
  ("answer", "references", "score"),
  [
    ("The answer is 1,200 tons", ["1200"], 1),
    ("The answer is 1,200.50 tons", ["1200.5"], 0),  # The rule knows commas or decimals.
    ("1,200.50", ["1200.5"], 1),
    ("so x = 24/7", ["24/7", "3.429"], 1),
    ("3.4291", ["24/7", "3.429"], 1),
    ("The total is 5", ["4"], 0),
    ("It is Art Deco.", ["art deco"], 1),
    ("x", ["y"], 0),
  ],
)
def test_mmmu_open_answers(answer, references, score):
  assert mmmu.open_match(answer, references) == score


CAPTIONS = ("A dog's ball isn't red.", "Two men (in hats) walk.", "a well-known cat")
REFERENCES = (
  ("A dog has a ball that isn't red.", "The dog's ball."),
  ("Two men walk, both in hats", "Men in hats are walking."),
  ("A cat, well-known!", "There is a cat"),
)


def test_captions_are_scored_as_coco_does():
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  held = {n: [{"caption": own} for own in references] for n, references in enumerate(REFERENCES)}
  given = {n: [{"caption": own}] for n, own in enumerate(CAPTIONS)}
  cider, each = Cider().compute_score(PTBTokenizer().tokenize(held), PTBTokenizer().tokenize(given))
  scores = captions.score(CAPTIONS, REFERENCES)
  assert scores.corpus["CIDEr"] == pytest.approx(100 * cider) and scores.each == pytest.approx(each.tolist())
  assert list(scores.corpus) == ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]


def test_captions_without_java(monkeypatch):
  monkeypatch.setattr(captions, "has_java", lambda: False)
  captions.score.cache_clear()
  scores = captions.score(("a dog runs", "two cats"), (("a dog runs", "the dog runs"), ("two cats", "cats")))
  captions.score.cache_clear()
  assert next(iter(scores.corpus)) == "~CIDEr"
  assert scores.corpus["~BLEU-1"] == pytest.approx(100) and scores.corpus["~ROUGE-L"] == pytest.approx(100)
  assert captions._plain({0: list(CAPTIONS)})[0] == [
    "a dog 's ball is n't red", "two men in hats walk", "a well-known cat",
  ]  # fmt: skip


def test_the_words_without_java_are_those_of_the_official_tokenizer():
  everything = {0: [*CAPTIONS, *itertools.chain(*REFERENCES), "A 3,000 lb. van"]}
  plain, ptb = captions._plain(everything)[0], captions._ptb(everything)[0]
  assert plain[:-1] == [" ".join(word for word in own.split() if not word.startswith("-")) for own in ptb[:-1]]


@pytest.mark.parametrize(
  ("module", "score"),
  [
    ("anls", lambda: text.anls("a", ["a"])),
    ("pycocoevalcap", lambda: captions.score(("a",), (("a",),))),
  ],
)
def test_a_missing_library_names_the_extra(module, score, monkeypatch):
  for name in [name for name in sys.modules if name.partition(".")[0] == module] + [module]:
    monkeypatch.setitem(sys.modules, name, None)
  captions.score.cache_clear()
  with pytest.raises(UserError, match=f"needs {module}, in the extra `eval`: pip install 'himap_jax\\[eval\\]'"):
    score()
