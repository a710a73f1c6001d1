"""HiMAP as the paper states it (arXiv 2503.13108), one sequence at a time and slow on purpose.

Nothing here comes from himap_jax. transformers' own decoder layers run one by one with eager attention, whole attention
maps are kept, there is no cache, and a token to be dropped is simply deleted from the sequence:

    before layer K1: s_v = sum of A[i, v] over the tokens i after the last image, A the attention of layer K1-1
    before layer K2: s_v = sum of A[i, v] over the image tokens i still there, A the attention of layer K2-1

both averaged over heads. The best tokens stay, in their order, at their original rotary positions; every text token stays.
A layer with a sliding window sees the tokens that it would see in the unpruned sequence.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import transformers

# methods made of HiMAP's own criteria, which need no compilation of their own where every method is compiled
ABLATIONS = frozenset({"himap_swapped", "instruction_attention", "image_attention"})


@dataclasses.dataclass(frozen=True)
class Forward:
  """One pass over a whole sequence.

  Attributes:
    logits: float32 [S, V] of the tokens that reached the last layer, in order.
    positions: int64 [S], where those stood in the unpruned sequence.
    kept: for each stage, the image tokens that stayed, numbered 0..N-1 in the unpruned sequence.
    margin: the smallest difference between a kept token's score and a dropped one's, over the stages.
    lengths: for each layer, how many tokens it ran on.
  """

  logits: torch.Tensor
  positions: torch.Tensor
  kept: tuple[tuple[int, ...], ...]
  margin: float
  lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
  """Tokens after a prompt, chosen greedily.

  Attributes:
    prompt: the pass over the prompt.
    lead: the smallest lead of a chosen token over the runner-up.
  """

  prompt: Forward
  tokens: list[int]
  lead: float

  def assert_is(self, token_ids: list[int], kept, first_logits, *, clear: float = 1e-5) -> None:
    """Compares an answer of ours, where scores and logits differ by more than `clear` and ten times that."""
    assert min(self.prompt.margin, 0.1 * self.lead) > clear, "so close that rounding decides; draw other weights"
    assert [tuple(stage) for stage in kept] == list(self.prompt.kept)
    np.testing.assert_allclose(first_logits, self.prompt.logits[-1], atol=1e-4, rtol=0)
    assert token_ids == self.tokens


@torch.no_grad()
def forward(
  model: transformers.LlavaForConditionalGeneration,
  input_ids: torch.Tensor,
  pictures: torch.Tensor | dict[str, torch.Tensor],
  *,
  prune_layers: tuple[int, ...],
  keep: tuple[int, ...],
  frozen: tuple[tuple[int, ...], ...] | None = None,
  gain: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
) -> Forward:
  """Runs one sequence, int64 [S], with its images, pruning before each of `prune_layers`.

  The images are [P, 3, H, W], or the arguments of `get_image_features`. The first stage scores by instruction attention
  and the second by image attention. `frozen` gives the kept sets of an earlier pass: nothing is scored then, and the
  same tokens are dropped. `gain` says what attention logits [S, S] gain in a layer, for tokens at these positions.
  """
  decoder = getattr(model.model, "language_model", None) or model.model.text_model
  hidden, image = image_embeddings(model, input_ids, pictures)
  positions = torch.arange(len(input_ids))

  kept, margin, lengths = [], float("inf"), []
  attention = None
  for index, layer in enumerate(decoder.layers):
    if index in prune_layers:
      stage = prune_layers.index(index)
      is_image = torch.isin(positions, image)
      if frozen is None:
        rows = positions > image[-1] if stage == 0 else is_image
        score = attention[rows][:, is_image].sum(0)
        order = score.sort(descending=True, stable=True).indices
        stays = positions[is_image][order[: keep[stage]]].sort().values
        if keep[stage] < len(order):
          gap = score[order[keep[stage] - 1]] - score[order[keep[stage]]]
          margin = min(margin, gap.item())
      else:
        stays = image[list(frozen[stage])]
      kept.append(tuple(torch.searchsorted(image, stays).tolist()))
      selected = ~is_image | torch.isin(positions, stays)
      hidden, positions = hidden[selected], positions[selected]
    lengths.append(len(positions))
    hidden, attention = run_layer(decoder, layer, hidden, positions, None if gain is None else gain(index, positions))
  logits = model.lm_head(decoder.norm(hidden))
  return Forward(logits=logits, positions=positions, kept=tuple(kept), margin=margin, lengths=tuple(lengths))


@torch.no_grad()
def generate(
  model: transformers.LlavaForConditionalGeneration,
  input_ids: torch.Tensor,
  pictures: torch.Tensor | dict[str, torch.Tensor],
  *,
  prune_layers: tuple[int, ...],
  keep: tuple[int, ...],
  max_new_tokens: int,
) -> Answer:
  """Greedy decoding that never stops early: each token by running the whole pruned sequence again."""
  prompt = forward(model, input_ids, pictures, prune_layers=prune_layers, keep=keep)
  tokens, lead, logits = [], float("inf"), prompt.logits
  for _ in range(max_new_tokens):
    best = logits[-1].topk(2)
    lead = min(lead, (best.values[0] - best.values[1]).item())
    tokens.append(best.indices[0].item())
    longer = torch.cat([input_ids, torch.tensor(tokens)])
    logits = forward(model, longer, pictures, prune_layers=prune_layers, keep=keep, frozen=prompt.kept).logits
  return Answer(prompt, tokens, lead)


def image_embeddings(model, input_ids, pictures):
  """Text embeddings with the images' features in their slots, [S, D], and these slots.

  A random model may answer with the image token; only as many as there are features are the images'.
  """
  pictures = pictures if isinstance(pictures, dict) else {"pixel_values": pictures}
  features = torch.cat(list(model.get_image_features(**pictures).pooler_output))
  slots = (input_ids == model.config.image_token_id).nonzero()[: len(features), 0]
  embeddings = model.get_input_embeddings()(input_ids)
  embeddings[slots] = features
  return embeddings, slots


def embed(model, input_ids, pixel_values):
  """As `image_embeddings`, for one image: with the first and the last of its slots."""
  embeddings, slots = image_embeddings(model, input_ids, pixel_values)
  assert (slots.diff() == 1).all(), "the image is one run of tokens"
  return embeddings, slots[0].item(), slots[-1].item()


def run_layer(decoder, layer, hidden, positions, gain=None):
  """Returns the layer's output [S, D] and its attention averaged over heads [S, S]."""
  maps = []
  hook = layer.self_attn.register_forward_hook(lambda module, arguments, output: maps.append(output[1]))
  window = getattr(layer.self_attn, "sliding_window", getattr(decoder.config, "sliding_window", None))
  distance = positions[:, None] - positions[None]
  hidden_pairs = (distance < 0) | (distance >= (window or len(positions) + distance.max()))
  mask = (torch.zeros(distance.shape) if gain is None else gain).masked_fill(hidden_pairs, -torch.inf)
  output = layer(
    hidden[None],
    attention_mask=mask[None, None],
    position_embeddings=decoder.rotary_emb(hidden[None], position_ids=positions[None]),
  )
  hook.remove()
  return output[0], maps[0][0].mean(0)
