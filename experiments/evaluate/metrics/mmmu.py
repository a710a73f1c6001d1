"""MMMU's rules for answers (Yue et al. 2023): `eval_utils.py` of MMMU-Benchmark/MMMU."""

import random
import re
from collections.abc import Mapping, Sequence

_MARKS = (",", ".", "!", "?", ";", ":", "'")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
  r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
  r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
  r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def chosen_letter(answer: str, options: Mapping[str, str], *, seed: str) -> str:
  """The option that an answer names last: as `(B)`, else `B`, else `B.`, else by its text in more than five words.

  Of an answer that names none, the official rule draws an option at random; `seed`, the question's id, makes the draw
  the same in every run.
  """
  for mark in _MARKS:
    answer = answer.strip(mark)
  answer = f" {answer} "
  for written, counted in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
    found = {letter: answer.rfind(counted.format(letter)) for letter in options if written.format(letter) in answer}
    if found:
      return max(found, key=found.__getitem__)
  if len(answer.split()) > 5:
    lower = answer.lower()
    found = {letter: lower.rfind(text.lower()) for letter, text in options.items() if text.lower() in lower}
    if found:
      return max(found, key=found.__getitem__)
  return random.Random(seed).choice(list(options))


def open_match(answer: str, references: Sequence[str]) -> float:
  """1 if what an open answer comes to holds a reference's text, or a number in it equals a reference to two decimals."""
  wanted = [value for reference in references for value in _normal(reference)]
  texts = [value for value in wanted if isinstance(value, str)]
  for value in _candidates(answer):
    if any(text in value for text in texts) if isinstance(value, str) else value in wanted:
      return 1.0
  return 0.0


def _candidates(answer: str) -> list[str | float]:
  """The ends of sentences after words such as `is` and `answer`, and the numbers in them."""
  answer = answer.strip().strip(".").lower()
  parts, ends = re.split(r"\.\s(?=[A-Z])|\n", answer), []
  for index, part in enumerate(parts):
    keys = (*_KEYS, "=") if index == len(parts) - 1 else _KEYS
    shortest = ""
    for key in keys:
      tail = part.split(key)[-1].strip()
      if key in part and (not shortest or len(tail) < len(shortest)):  # An empty one replaces and is replaced.
        shortest = tail
    if shortest and shortest not in _MARKS:
      ends.append(shortest)
  ends = ends or [answer]
  numbers = [number for end in ends for pattern in _NUMBERS for number in re.findall(pattern, end)]
  return [value for text in (*ends, *numbers) for value in _normal(text)]


def _normal(text: str) -> list[str | float]:
  """A number to two decimals, else the text in lower case; a single letter needs a space on one side."""
  text = text.strip()
  try:
    return [round(float(text.replace(",", "")), 2)]
  except ValueError:
    text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]
