"""Which option an answer names: the rules of ScienceQA, SEED-Bench, MMBench and A-OKVQA."""

import difflib
import re
from collections.abc import Mapping, Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def lettered(options: Sequence[str]) -> dict[str, str]:
  """Options by their letters."""
  return dict(zip(LETTERS, options, strict=False))


def scienceqa_letter(answer: str, options: Mapping[str, str]) -> str | None:
  """LLaVA's rule for ScienceQA: `B`, `B. …`, or `The answer is B.` exactly once; by its `eval_science_qa.py`."""
  if re.fullmatch("[A-E]", answer) or re.match(r"[A-E]\. ", answer):
    letters = [answer[0]]
  else:
    letters = re.findall("The answer is ([A-Z]).", answer)
  return letters[0] if len(letters) == 1 and letters[0] in options else None


def leading_letter(answer: str, options: Mapping[str, str]) -> str | None:
  """The option's letter that an answer begins with, as a word and perhaps in brackets: `B`, `B.`, `(B) two`."""
  match = re.match(r"\(?([A-Z])\b", answer.strip())
  return match[1] if match and match[1] in options else None


_WRAPPED = [("", end) for end in ("", ".", ",", ":", ")", ").")]
_WRAPPED += [("(", ")"), ("(", ")."), *((":", end) for end in ("", ",", ".", ")", ")."))]


def mmbench_letter(answer: str, options: Mapping[str, str]) -> str | None:
  """MMBench's rule before its judge (Liu et al. 2023): a letter that alone stands as a word, else an option's text.

  Each way to write a letter is tried in order: `B`, `B.`, `B,`, `B:`, `B)`, `(B)`, … The first in which just one option
  appears decides; a lone `A` in a sentence of more than three words may be an article and decides nothing. Otherwise the
  one option whose text is in the answer is meant. There is no judge: an answer that names no option is wrong.
  """
  words = answer.split()
  for start, end in _WRAPPED:
    found = [letter for letter in LETTERS[:5] if f"{start}{letter}{end}" in words]
    may_be_an_article = not start + end and "A" in words and len(words) > 3
    if len(found) == 1 and not may_be_an_article:
      return found[0]
  named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
  return named[0] if len(named) == 1 else None


def nearest_letter(answer: str, options: Mapping[str, str]) -> str:
  """The option that a free answer means, for A-OKVQA, which scores the text of one of the options.

  A letter as in `mmbench_letter`, else the option that resembles the answer most (`difflib`), as A-OKVQA's authors map
  free answers to their nearest option.
  """
  named = mmbench_letter(answer, options)
  if named in options:
    return named

  def likeness(letter: str) -> float:
    return difflib.SequenceMatcher(None, options[letter].lower(), answer.lower()).ratio()

  return max(options, key=likeness)
