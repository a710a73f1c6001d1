"""VQA accuracy (Antol et al. 2015): ten people answered, and an answer is right if three of them gave it."""

import re
from collections.abc import Sequence

_CONTRACTED = """
  'ow's'at 'twas I'd've I'm I've ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
  hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've
  must've mustn't needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd've
  somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
  there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
  what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
  would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
# A word that lacks one apostrophe gets it, but `lets` and `shes` stay, and one entry is the other way round.
CONTRACTIONS = {
  word[:place] + word[place + 1 :]: word
  for word in _CONTRACTED
  for place, letter in enumerate(word)
  if letter == "'" and word not in ("let's", "she's")
} | {"somebody'd": "somebodyd"}
_NUMBERS = {
  word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # The official pattern; its first group, a typing error there, never holds.
_MAX_PERIODS = int(re.UNICODE)  # The official code passes this flag where a count belongs.


def accuracy(answer: str, references: Sequence[str]) -> float:
  """VQAv2's accuracy: for each person min(1, matches among the other people / 3), averaged.

  As in the official evaluation, answers are normalised only where the people's answers differ.

  Source: `vqaEval.py` of GT-Vision-Lab/VQA.
  """
  answer, references = _one_line(answer), [_one_line(reference) for reference in references]
  if len(set(references)) > 1:
    answer, references = normalise(answer), [normalise(reference) for reference in references]
  return _leave_one_out(answer, references)


def textvqa_accuracy(answer: str, references: Sequence[str]) -> float:
  """TextVQA's accuracy: the same rule, but every answer is cleaned as by `clean`.

  Source: `m4c_evaluator.py` of Pythia, which LLaVA's evaluation uses.
  """
  return _leave_one_out(clean(answer), [clean(reference) for reference in references])


def clean(answer: str) -> str:
  """An answer as EvalAI's server and its submissions hold it: lower case, without commas, then `normalise`."""
  answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
  return normalise(_one_line(answer.strip()))


def normalise(answer: str) -> str:
  """The official normalisation: punctuation, then case, number words, articles and contractions."""
  result, has_number = answer, _COMMA_IN_NUMBER.search(answer)
  for mark in _PUNCTUATION:
    at_an_end = f"{mark} " in answer or f" {mark}" in answer
    result = result.replace(mark, "" if at_an_end or has_number else " ")
  words = _PERIOD.sub("", result, count=_MAX_PERIODS).lower().split()
  words = [_NUMBERS.get(word, word) for word in words]
  return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(answer: str) -> str:
  return answer.replace("\n", " ").replace("\t", " ").strip()


def _leave_one_out(answer: str, references: Sequence[str]) -> float:
  matches = sum(reference == answer for reference in references)
  return sum(min(1.0, (matches - (reference == answer)) / 3) for reference in references) / len(references)
