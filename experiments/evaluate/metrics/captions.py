"""Captions: CIDEr, BLEU and ROUGE-L of the COCO evaluation, through pycocoevalcap."""

import functools
import re
import shutil
from typing import NamedTuple

from experiments.evaluate.libraries import library

APPROXIMATE = "~"  # before names of scores of another tokenizer
_TOKEN = re.compile(r"n't\b|'\w+|\w+?(?=n't\b)|\w+(?:[-.,]\w+)*")


class CaptionScores(NamedTuple):
  """The scores of all captions, in the field's unit (percent), and CIDEr of each."""

  corpus: dict[str, float]
  each: list[float]


def has_java() -> bool:
  return shutil.which("java") is not None


@functools.lru_cache(maxsize=4)
def score(captions: tuple[str, ...], references: tuple[tuple[str, ...], ...]) -> CaptionScores:
  """Scores captions, each with its pictures' references, as the COCO evaluation does without METEOR and SPICE.

  CIDEr weighs words by how many pictures' references have them: it depends on the set of pictures, and a part of a data
  set gives other values than the whole. Without Java a
  simpler rule splits captions into words, and the names of the scores begin with `~`.

  Raises:
    UserError: pycocoevalcap is not installed.
  """
  scorers = [
    library("pycocoevalcap.cider.cider", "a caption metric").Cider(),
    library("pycocoevalcap.bleu.bleu", "a caption metric").Bleu(4),
    library("pycocoevalcap.rouge.rouge", "a caption metric").Rouge(),
  ]
  tokenize, mark = (_ptb, "") if has_java() else (_plain, APPROXIMATE)
  wanted = tokenize({n: [" ".join(text.split()) for text in own] for n, own in enumerate(references)})
  given = tokenize({n: [" ".join(caption.split())] for n, caption in enumerate(captions)})
  (cider, each), (bleu, _), (rouge, _) = (
    scorer.compute_score(wanted, given, **({"verbose": 0} if index == 1 else {}))
    for index, scorer in enumerate(scorers)
  )
  values = {"CIDEr": cider, **{f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)}, "ROUGE-L": rouge}
  return CaptionScores({f"{mark}{name}": 100 * float(value) for name, value in values.items()}, [*map(float, each)])


def _ptb(captions: dict[int, list[str]]) -> dict[int, list[str]]:
  tokenizer = library("pycocoevalcap.tokenizer.ptbtokenizer", "a caption metric").PTBTokenizer()
  return tokenizer.tokenize({n: [{"caption": caption} for caption in own] for n, own in captions.items()})


def _plain(captions: dict[int, list[str]]) -> dict[int, list[str]]:
  """Words in lower case without punctuation; `n't` and `'s` are words of their own."""
  return {n: [" ".join(_TOKEN.findall(caption.lower())) for caption in own] for n, own in captions.items()}
