"""From the flow of questions to figures by layer, under the paper's normalisation and its code's.

Axes: L layers, Q questions, P blocks.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments import statistics, tabular
from experiments.flow import tokens
from experiments.saliency.saliency import Flow

VISUAL_TEXTUAL, INTRA_VISUAL = "image→instruction", "image→image"


class Blocks(NamedTuple):
  """The saliency of every block, question by question.

  Attributes:
    by_pair: the mean over a block's pairs of |Σ over heads| (the paper's S, Eq. 2).
    summed: the sum over its pairs of |mean over heads| (as the authors' code has it).
  """

  by_pair: Float[np.ndarray, "L Q P"]
  summed: Float[np.ndarray, "L Q P"]


class Contributions(NamedTuple):
  """What the last token receives from each kind of token, question by question; the shares of a layer add up to 1.

  Attributes:
    whole: share of all saliency into the last token.
    by_token: share of the kinds' mean saliency a token (as the authors' code normalises, by length).
  """

  whole: Float[np.ndarray, "L Q 3"]
  by_token: Float[np.ndarray, "L Q 3"]


def blocks(flow: Flow, num_heads: int) -> Blocks:
  """Both normalisations of the blocks."""
  return Blocks(flow.sums / np.maximum(flow.pairs, 1)[None], flow.sums / num_heads)


def contributions(flow: Flow) -> Contributions:
  """Both normalisations of what flows into the last token."""
  each = flow.contributions / np.maximum(flow.num_tokens, 1)[None]
  return Contributions(
    flow.contributions / flow.contributions.sum(axis=-1, keepdims=True), each / each.sum(axis=-1, keepdims=True)
  )


def turning_layer(ratio: Float[np.ndarray, "L"]) -> int | None:
  """The first layer from which on S_vv ÷ S_vt is above one, up to the last but one; None where there is none.

  The last layer says nothing: after it no image token is read any more, so that nothing flows within the image.
  """
  below = np.flatnonzero(ratio[:-1] <= 1)
  first = 0 if below.size == 0 else int(below[-1]) + 1
  return first if first < len(ratio) - 1 else None


def rows_of_blocks(result: Blocks) -> list[dict[str, Any]]:
  """A row for every layer and block."""
  rows = []
  for number, name in enumerate(tokens.BLOCKS):
    low, high = statistics.interval(statistics.resample(result.by_pair[..., number]))
    for layer in range(len(low)):
      rows.append(
        {
          "layer": layer,
          "block": name,
          "by_pair": result.by_pair[layer, :, number].mean(),
          "by_pair_low": low[layer],
          "by_pair_high": high[layer],
          "summed": result.summed[layer, :, number].mean(),
        }
      )
  return rows


def rows_of_contributions(result: Contributions) -> list[dict[str, Any]]:
  """A row for every layer and kind of token."""
  return [
    {
      "layer": layer,
      "tokens": kind,
      "whole": result.whole[layer, :, number].mean(),
      "by_token": result.by_token[layer, :, number].mean(),
    }
    for number, kind in enumerate(tokens.KINDS)
    for layer in range(result.whole.shape[0])
  ]


def write_markdown(path: pathlib.Path, result: Blocks, shares: Contributions, flow: Flow, heading: str) -> None:
  """Writes the figures that the paper shows."""
  names = list(tokens.BLOCKS)
  text, image = names.index(VISUAL_TEXTUAL), names.index(INTRA_VISUAL)
  header = ("layer", "S_vt a pair", "S_vv a pair", "÷", "S_vt summed", "S_vv summed", "÷", *tokens.KINDS)
  pair, summed = result.by_pair.mean(axis=1), result.summed.mean(axis=1)
  ratios = [values[:, image] / values[:, text] for values in (pair, summed)]
  lines = [
    [
      str(layer),
      *(f"{pair[layer, block]:.2e}" for block in (text, image)),
      f"{ratios[0][layer]:.2f}",
      *(f"{summed[layer, block]:.2e}" for block in (text, image)),
      f"{ratios[1][layer]:.2f}",
      *(f"{share:.1%}" for share in shares.whole[layer].mean(axis=0)),
    ]
    for layer in range(len(pair))
  ]
  each = (shares.whole / np.maximum(flow.num_tokens, 1)[None]).mean(axis=(0, 1))
  turns = [turning_layer(ratio) for ratio in ratios]
  content = [
    heading,
    "",
    "S_vt is what flows from image to instruction, S_vv from image to image; the last columns are the shares of what flows into "
    "the last token.",
    "",
    *tabular.markdown(header, lines),
    "",
    *(
      f"- {name}: S_vv stays above S_vt {'from no layer on' if turn is None else f'from layer {turn} on, but for the last'}."
      for name, turn in zip(("A pair", "Summed"), turns, strict=True)
    ),
    "- One token's share of what flows into the last, mean over layers: "
    + ", ".join(f"{kind} {share:.3%}" for kind, share in zip(tokens.KINDS, each, strict=True))
    + ".",
  ]
  path.write_text("\n".join(content) + "\n", encoding="utf-8")
