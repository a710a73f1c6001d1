"""Scores of short answers: equality, relaxed equality, edit distance, and agreement of several people."""

from collections.abc import Sequence

from experiments.evaluate.libraries import library

RELAXED = 0.05  # relative error that ChartQA allows


def gqa_match(answer: str, reference: str) -> float:
  """GQA's accuracy: equality, of the answer in lower case without final periods, as LLaVA hands it to GQA's script."""
  return float(answer.rstrip(".").lower() == reference)


def relaxed_match(answer: str, reference: str) -> float:
  """ChartQA's relaxed accuracy (Masry et al. 2022): numbers within 5%, other answers equal in lower case.

  A number may be a percentage. A reference of zero is compared as text.

  Source: `relaxed_correctness` of google-research/pix2struct.
  """
  number, wanted = _number(answer), _number(reference)
  if number is not None and wanted:
    return float(abs(number - wanted) / abs(wanted) <= RELAXED)
  return float(answer.lower() == reference.lower())


def anls(answer: str, references: Sequence[str]) -> float:
  """Average normalised Levenshtein similarity (Biten et al. 2019): of the nearest reference, 0 if half of it differs.

  Computed by the package `anls`; raises `UserError` if it is not installed.
  """
  return float(library("anls", "ANLS").anls_score(answer, list(references), threshold=0.5))


def direct_answer(answer: str, references: Sequence[str]) -> float:
  """A-OKVQA's direct answers: min(1, the number of people who gave exactly this answer / 3).

  Source: `eval_predictions.py` of allenai/aokvqa.
  """
  return min(1.0, sum(reference == answer for reference in references) / 3)


def _number(text: str) -> float | None:
  try:
    return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
  except ValueError:
    return None
