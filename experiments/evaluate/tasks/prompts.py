"""Parts of questions that several tasks share, as LLaVA-1.5 was trained and evaluated with them.

Source: `docs/Evaluation.md` of haotian-liu/LLaVA.
"""

from collections.abc import Mapping

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def choice_question(question: str, options: Mapping[str, str]) -> str:
  """A question, its options on a line each, and the request for a letter."""
  return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())]) + LETTER
