"""Where does visual information flow, layer by layer? Saliency of attention (HiMAP, sections 2 and 3.1).

    python -m experiments.flow.saliency --flagfile=experiments/flags/saliency.flags

For every layer: the saliency from the image into the instruction (S_vt), within the image (S_vv) and of the other
blocks, the contribution of each kind of token to the last token, and heat maps on pictures. For the image's flows: at
which depth they are concentrated. Where text reads the image by cross-attention, a layer has some of the blocks alone.

The saliency of a pair of tokens is I = |Σ over heads of A ⊙ ∂L/∂A| (Eq. 1), with L the cross-entropy of the answer's
first token. Each probability is multiplied by a one that all heads share; the gradient with respect to these ones is
the sum.

Axes: L layers, B batch, Q questions, S slots, N image tokens, V vocabulary, P blocks.
"""

import functools
import math
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int

from experiments.flow import saliency_plots, tokens
from experiments.flow.decoder import attended, first_logits, weigh
from experiments.question_sets import Question
from experiments.shared import statistics, study, tabular
from experiments.shared.subject import Batch, Subject
from himap_jax.inputs import Inputs, Layout, take_slots
from himap_jax.model.network import Embedded, Model


class Flow(NamedTuple):
  """Saliency by layer, summed over blocks and kinds of tokens."""

  sums: Float[Array, "L B P"]  # over the pairs of each of `tokens.BLOCKS`; NaN where the layer does not attend so
  pairs: Int[Array, "L B P"]  # the number of these pairs
  contributions: Float[Array, "L B 3"]  # from all tokens of each of `tokens.KINDS` into the last token
  num_tokens: Int[Array, "L B 3"]  # tokens of each kind
  to_instruction: Float[Array, "L B N"]  # from every image token into the instruction
  to_image: Float[Array, "L B N"]  # from every image token into the image


def measure(subject: Subject, workdir: pathlib.Path, *, layers_at_a_time: int) -> tuple[list[Question], Flow]:
  """The flow of all questions, with Q in place of B; the saliency of `layers_at_a_time` layers is in memory at once."""

  def compute(batch: Batch) -> dict[str, np.ndarray]:
    answers, parts = None, []
    for first in range(0, subject.num_layers, layers_at_a_time):
      layers = tuple(range(first, min(first + layers_at_a_time, subject.num_layers)))
      part, answers = flow_of(subject.loaded.model, batch.inputs, answers, layers=layers)
      parts.append(jax.tree.map(np.asarray, part))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)._asdict()

  questions, arrays = subject.measure(workdir / "flow", compute, axis=1)
  return questions, Flow(**arrays)


@functools.partial(jax.jit, static_argnames="layers")
def flow_of(
  model: Model, inputs: Inputs, answers: Int[Array, "B"] | None, *, layers: tuple[int, ...]
) -> tuple[Flow, Int[Array, "B"]]:
  """The flow in some layers, and the first token of each answer: the model's own where `answers` is None."""
  embedded = jax.lax.stop_gradient(model.bind().embed(inputs))
  if answers is None:
    answers = first_logits(model, embedded, {}).argmax(axis=-1)
  values = saliency(model, embedded, answers, layers)
  result = jax.vmap(flow, in_axes=(0, None))(values, embedded.layout)
  attends = [[layer in tokens.layers_of(model.config.text, name) for name in tokens.BLOCKS] for layer in layers]
  attends = jnp.array(attends)[:, None]
  sums, pairs = jnp.where(attends, result.sums, jnp.nan), jnp.where(attends, result.pairs, 0)
  return result._replace(sums=sums, pairs=pairs), answers


def saliency(
  model: Model, embedded: Embedded, answers: Int[Array, "B"], layers: tuple[int, ...]
) -> Float[Array, "L B S S"]:
  """Saliency of every pair (query, key) in some layers, given the first token of each answer.

  It is zero between tokens that the layer's attention does not connect.
  """
  batch, slots = embedded.x.shape[:2]

  def loss(ones: Float[Array, "L B S S"]) -> Float[Array, ""]:
    edits = {
      layer: lambda probabilities, values, one=attended(model, embedded.layout, layer).pairs(one): weigh(
        probabilities * one[:, None], values
      )
      for layer, one in zip(layers, ones, strict=True)
    }
    logits = first_logits(model, embedded, edits)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), answers[:, None], axis=1).sum()

  return jnp.abs(jax.grad(loss)(jnp.ones((len(layers), batch, slots, slots), jnp.float32)))


def flow(values: Float[Array, "B S S"], layout: Layout) -> Flow:
  """Sums a layer's saliency by blocks and kinds of tokens; the result has no L axis."""
  masks = jnp.stack([tokens.block(layout, name) for name in tokens.BLOCKS], axis=1)
  kinds = jnp.stack(list(tokens.kinds(layout).values()), axis=1)
  last = take_slots(values, layout.last_slot()[:, None])[:, 0]
  into = [take_slots(jnp.where(masks[:, block], values, 0).sum(axis=1), layout.image_slots()) for block in (0, 1)]
  return Flow(
    sums=jnp.einsum("BST,BPST->BP", values, masks.astype(values.dtype)),
    pairs=masks.sum(axis=(2, 3)),
    contributions=jnp.einsum("BS,BCS->BC", last, kinds.astype(values.dtype)),
    num_tokens=kinds.sum(axis=2),
    to_instruction=into[0],
    to_image=into[1],
  )


def blocks(flow: Flow, num_heads: int) -> dict[str, Float[np.ndarray, "L Q P"]]:
  """Saliency of every block by question, in two normalisations; NaN where the layer does not attend so.

  `by_pair` is the mean over a block's pairs of |Σ over heads| (the paper's S, Eq. 2), `summed` the sum over its pairs
  of |mean over heads| (the authors' code).
  """
  return {"by_pair": flow.sums / np.maximum(flow.pairs, 1), "summed": flow.sums / num_heads}


def contributions(flow: Flow, *, of_all_layers: bool = False) -> dict[str, Float[np.ndarray, "L Q 3"]]:
  """Shares of each kind of token in the saliency into the last token, by question, in two normalisations.

  `whole` is the share of all saliency; `by_token` uses the mean over a kind's tokens in place of the sum (the authors'
  code). They are shares of a layer, or of the sum over all layers: with cross-attention a layer's saliency comes from
  the image alone or from text alone, so its own shares say nothing.
  """
  axes = (0, 2) if of_all_layers else (2,)
  parts = {"whole": flow.contributions, "by_token": flow.contributions / np.maximum(flow.num_tokens, 1)}
  return {name: part / part.sum(axis=axes, keepdims=True) for name, part in parts.items()}


def depths(flow: Flow, layers: Sequence[int]) -> list[tabular.Row]:
  """Where in the decoder the image's flows are concentrated: means over questions with 95% intervals.

  `first_half` is the share of a flow's saliency, summed over pairs, in the first half of the decoder's layers (of an odd
  number, without the middle one), and `depth` its mean place from 0, the first layer, to 1, the last. `even_…` are those
  of a flow spread evenly over `layers`, in which image tokens are read.
  """
  number = np.arange(len(flow.sums))
  places = {"first_half": (number < len(number) // 2).astype(float), "depth": number / max(len(number) - 1, 1)}
  even = {f"even_{name}": float(place[list(layers)].mean()) for name, place in places.items()}
  flows = {"image→instruction": np.nan_to_num(flow.sums[..., 0]), "image→last token": flow.contributions[..., 1]}
  rows = []
  for name, values in flows.items():
    total = values.sum(axis=0)
    own = {measure: (place @ values / total)[None] for measure, place in places.items()}
    rows.append({"flow": name, **statistics.mean_rows(own)[0], **even})
  return rows


def turning_layer(ratio: Float[np.ndarray, "L"]) -> int | None:
  """The first layer from which S_vv ÷ S_vt stays above 1 up to the last but one; in the last, S_vv is always 0."""
  below = np.flatnonzero(ratio[:-1] <= 1)
  first = 0 if below.size == 0 else int(below[-1]) + 1
  return first if first < len(ratio) - 1 else None


def rows_of_blocks(result: dict[str, np.ndarray]) -> list[tabular.Row]:
  rows = []
  for number, name in enumerate(tokens.BLOCKS):
    by_pair, summed = (values[..., number] for values in result.values())
    for layer, row in enumerate(statistics.mean_rows({"by_pair": by_pair})):
      row |= {"summed": summed[layer].mean()}
      missing = dict.fromkeys(row) if np.isnan(row["summed"]) else {}  # an empty cell
      rows.append({"layer": layer, "block": name, **row, **missing})
  return rows


def rows_of_contributions(result: dict[str, np.ndarray]) -> list[tabular.Row]:
  return [
    {"layer": layer, "tokens": kind} | {name: values[layer, :, number].mean() for name, values in result.items()}
    for number, kind in enumerate(tokens.KINDS)
    for layer in range(len(result["whole"]))
  ]


def summary(result: dict[str, np.ndarray], shares: dict[str, np.ndarray], flow: Flow) -> list[str]:
  columns, turns = [("layer", np.arange(len(flow.sums)), "d")], []
  for name, values in zip(("A pair", "Summed"), result.values(), strict=True):
    s_vt, s_vv = (values[..., block].mean(axis=1) for block in (0, 1))
    columns += [(f"S_vt {name.lower()}", s_vt, ".2e"), (f"S_vv {name.lower()}", s_vv, ".2e"), ("÷", s_vv / s_vt, ".2f")]
    turn = turning_layer(s_vv / s_vt)
    since = "from no layer on" if turn is None else f"from layer {turn} on, but for the last"
    turns.append(f"- {name}: S_vv stays above S_vt {since}.")
  columns += [(kind, own, ".1%") for kind, own in zip(tokens.KINDS, shares["whole"].mean(axis=1).T, strict=True)]
  cells = [[f"{values[layer]:{form}}" for _, values, form in columns] for layer in range(len(flow.sums))]
  each = (shares["whole"] / np.maximum(flow.num_tokens, 1)).mean(axis=(0, 1))
  share_of_one = ", ".join(f"{kind} {share:.3%}" for kind, share in zip(tokens.KINDS, each, strict=True))
  return [
    "S_vt is the saliency from image to instruction, S_vv that from image to image; the last columns are shares of the "
    "saliency into the last token.",
    "",
    *tabular.markdown([heading for heading, *_ in columns], cells),
    "",
    *turns,
    f"- One token's share of the saliency into the last token, mean over layers: {share_of_one}.",
  ]


def summary_of_cross_layers(
  result: dict[str, np.ndarray], shares: dict[str, np.ndarray], layers: Sequence[int]
) -> list[str]:
  """As `summary`, for a model whose text reads the image by cross-attention in `layers`."""
  into_instruction = [values[..., 0].mean(axis=1) for values in result.values()]
  by_kind = shares["whole"].mean(axis=1)
  cells = [
    [str(layer), *(f"{values[layer]:.2e}" for values in into_instruction), f"{by_kind[layer, 1]:.1%}"]
    for layer in layers
  ]
  kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in zip(tokens.KINDS, by_kind.sum(axis=0), strict=True))
  return [
    "S_vt is the saliency from image to instruction, in the layers in which the text reads the image; the last column is "
    "the image's part in these layers of the saliency into the last token, summed over all layers.",
    "",
    *tabular.markdown(["layer", "S_vt a pair", "S_vt summed", "image into the last token"], cells),
    "",
    "- No layer changes image tokens, so S_vv and its ratio to S_vt do not exist.",
    f"- Shares of the saliency into the last token, summed over all layers: {kinds}.",
  ]


def summary_of_depths(rows: Sequence[tabular.Row]) -> list[str]:
  first_half, depth = tabular.with_interval("first_half", ".0%"), tabular.with_interval("depth", ".2f")
  columns = {
    "flow": "{flow}",
    "in the first half of the layers": first_half,
    "mean depth": depth,
    "spread evenly": "{even_first_half:.0%}, {even_depth:.2f}",
  }
  return [
    "",
    "Where the image's flows are concentrated, with 95% intervals over questions. Depth 0 is the first layer, 1 the last; "
    "the last column is of a flow spread evenly over the layers in which image tokens are read.",
    "",
    *tabular.formatted(rows, columns),
  ]


def define_flags() -> None:
  at_once = "Layers whose saliency is in memory at once, 4 bytes × rows × slots² each."
  flags.DEFINE_integer("layers_at_a_time", 10, at_once, lower_bound=1)
  flags.DEFINE_integer("num_maps", 4, "Number of pictures with heat maps.", lower_bound=0)
  flags.DEFINE_list(
    "map_layers", None, "Layers with heat maps, of those in which the image is read; eight evenly spaced by default."
  )


def run(values: Any) -> study.Report:
  subject = study.load_subject(needs_sequence=False)
  text = subject.opened.config.text
  has_cross_layers, read = bool(text.cross_attention_layers), tokens.layers_of(text, "image→instruction")
  layers = study.layers(values["map_layers"], subject)
  if not values.map_layers:
    layers = sorted({layers[len(layers) * step // 8] for step in range(8)})
  questions, flow = measure(subject, study.workdir_for(subject), layers_at_a_time=values.layers_at_a_time)
  by_block, depth = blocks(flow, text.num_attention_heads), depths(flow, read)
  shares = contributions(flow, of_all_layers=has_cross_layers)
  plots = {
    "saliency": saliency_plots.plot_blocks(by_block),
    "contributions": saliency_plots.plot_contributions(shares, of_all_layers=has_cross_layers),
  }
  first_of_image: dict[pathlib.Path, int] = {}
  for index, question in enumerate(questions):
    first_of_image.setdefault(question.image, index)
  chosen = list(first_of_image.values())[: values.num_maps]
  if chosen and subject.processor.num_image_tokens == math.prod(subject.processor.patch_grid):
    asked = [questions[index] for index in chosen]
    shown = [(textwrap.fill(q.question, 24), subject.processor.views(subject.example(q))[0].picture) for q in asked]
    for name in ("to_instruction",) if has_cross_layers else ("to_instruction", "to_image"):
      maps = getattr(flow, name)[:, chosen]
      plots[f"maps_{name}"] = saliency_plots.plot_maps(shown, maps, subject.processor.patch_grid, layers)
  tables = {"saliency": rows_of_blocks(by_block), "contributions": rows_of_contributions(shares), "depth": depth}
  own = summary_of_cross_layers(by_block, shares, read) if has_cross_layers else summary(by_block, shares, flow)
  return study.Report(f"{len(questions)} questions", own + summary_of_depths(depth), tables, plots)


if __name__ == "__main__":
  study.start("flow.saliency", define_flags, run)
