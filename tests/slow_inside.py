"""Slow pruning methods inside the decoder; see `tests/pruning/test_methods.py`."""

import math

import numpy as np
from slow_basics import cosine, softmax, top


def attention_of(query, key, row):
  """Probabilities `[head, position]` of one causal query row."""
  maps, (_, num_heads, head_dim) = [], query.shape
  for head in range(num_heads):
    keys = key[: row + 1, head // (num_heads // key.shape[1])]
    maps.append(softmax(keys @ query[row, head] / math.sqrt(head_dim)))
  return np.array(maps)


def mean_attention(query, key, rows, image):
  """For each image token, the sum over rows of the attention averaged over heads."""
  scores = np.zeros(len(image))
  for row in rows:
    maps = attention_of(query, key, row).mean(axis=0)
    for index, position in enumerate(image):
      if position <= row:
        scores[index] += maps[position]
  return scores


def himap_1(row, keep):
  return top(mean_attention(row.query, row.key, row.text_after, row.image), keep)


def himap_2(row, keep):
  return top(mean_attention(row.query, row.key, row.image, row.image), keep)


def fastv(row, keep):
  return top(mean_attention(row.query, row.key, [len(row.x) - 1], row.image), keep)


def pyramiddrop(row, keep):
  return top(mean_attention(row.next_query, row.next_key, [len(row.x) - 1], row.image), keep)


def sparsevlm(row, keep):
  shares = np.zeros(len(row.text_after))
  for position in row.image:
    shares += softmax(np.array([row.embeddings[position] @ row.embeddings[text] for text in row.text_after]))
  shares /= len(row.image)
  raters = [text for text, share in zip(row.text_after, shares, strict=True) if share > shares.mean()]
  assert len(raters) < len(row.text_after)
  return top(mean_attention(row.query, row.key, raters or row.text_after, row.image), keep)


def dart(row, keep):
  norms = np.abs(row.key).sum(axis=(1, 2))

  def by_norm(positions):
    return sorted(positions, key=lambda p: -norms[p])

  image_pivots, text_pivots = by_norm(row.image)[:4], by_norm(row.text_after)[:4]
  text_pivots += text_pivots[:1] * (min(4, row.most_text) - len(text_pivots))
  pivots, retained = image_pivots + text_pivots, set(image_pivots)
  for number, pivot in enumerate(pivots):
    count = (keep - 4) // len(pivots) + (number < (keep - 4) % len(pivots))
    rest = [p for p in row.image if p not in retained]
    rest.sort(key=lambda p: cosine(row.x[pivot], row.x[p]))
    retained |= set(rest[:count])
  return sorted(row.image.index(p) for p in retained)


def fitprune(row, keep):
  def received(rows):
    total = np.zeros(len(row.image))
    for r in rows:
      maps = attention_of(row.query, row.key, r).max(axis=0)
      total += [maps[p] if p <= r else 0 for p in row.image]
    return total

  return top(received(row.image) * received(row.text_after), keep)


def visipruner(row, keep):
  num_heads, last = row.query.shape[1], len(row.x) - 1
  attention, values = (
    attention_of(row.query, row.key, last),
    np.repeat(row.value, num_heads // row.key.shape[1], axis=1),
  )

  def output(slots):
    return np.concatenate([attention[head, slots] @ values[slots, head] for head in range(num_heads)])

  whole = list(range(last + 1))
  return top([np.linalg.norm(output(whole) - output([p for p in whole if p != i])) for i in row.image], keep)


def adaptive(stage):
  """HiMAP with a third, two thirds or all of the tokens that may be kept: the fewest with 70% of the scores."""

  def slow(row, keep):
    if stage == 1:  # a row that lacks no tokens is on the last rung
      return himap_2(row, keep)
    scores = mean_attention(row.query, row.key, row.text_after, row.image)
    counts = [max(1, round(keep / 3)), max(1, round(2 * keep / 3)), keep]
    enough = [count for count in counts if scores[top(scores, count)].sum() >= 0.7 * scores.sum()]
    return top(scores, (enough or counts[-1:])[0])

  return slow
