"""Slow pruning methods before the decoder; see `tests/pruning/test_methods.py`."""

import math

import numpy as np
from slow_basics import cosine, softmax, top


def fastervlm(row, keep):
  return top(row.class_attention, keep)


def vispruner(row, keep):
  order = sorted(range(len(row.image)), key=lambda i: -row.class_attention[i])
  important, residual = order[: keep // 2], order[keep // 2 :]
  wanted = keep - keep // 2
  while len(residual) > wanted:
    even, odd = residual[::2], residual[1::2]
    likeness = {e: max(cosine(row.features[e], row.features[o]) for o in odd) for e in even}
    ranked = sorted(even, key=lambda e: -likeness[e])
    residual = ranked[min(8, len(residual) - wanted) :] + odd
  return sorted(important + residual)


def visionzip(row, keep):
  num_contextual = round(keep * 10 / 64)
  dominant = top(row.class_attention, keep - num_contextual)
  rest = [i for i in range(len(row.image)) if i not in dominant]
  step = max(1, len(rest) // num_contextual)
  targets = rest[::step][:num_contextual]
  keys = row.tower_keys.mean(axis=1)
  members = {target: [] for target in targets}
  for i in rest:
    if i not in targets:
      members[max(targets, key=lambda target: cosine(keys[i], keys[target]))].append(row.features[i])
  kept = sorted(dominant + targets)
  merged = [row.features[i] + (np.mean(members[i], axis=0) if members.get(i) else 0) for i in kept]
  return kept, np.tanh(np.array(merged) @ row.projector)


def prumerge(row, keep):
  outliers = top(row.class_attention, round(keep / 4))
  num_tokens = len(row.image)
  rest = [i for i in range(num_tokens) if i not in outliers]
  num_samples = keep - len(outliers)
  kept = sorted(outliers + [rest[j * len(rest) // num_samples] for j in range(num_samples)])
  keys = row.tower_keys.reshape(num_tokens, -1)
  merged = []
  for i in kept:
    others = sorted((j for j in range(num_tokens) if j != i), key=lambda j: -cosine(keys[i], keys[j]))[:32]
    merged.append(row.features[i] + sum(row.class_attention[j] * row.features[j] for j in others))
  return kept, np.tanh(np.array(merged) @ row.projector)


def divprune(row, keep):
  tokens = row.x[row.image]
  num_tokens = len(tokens)
  distance = [[1 - cosine(a, b) for b in tokens] for a in tokens]
  chosen = []
  while len(chosen) < keep:
    best, best_reach = None, -math.inf
    for i in range(num_tokens):
      if i not in chosen:
        reach = min(distance[i][j] for j in (chosen or range(num_tokens)) if j != i)
        if reach > best_reach:
          best, best_reach = i, reach
    chosen.append(best)
  return sorted(chosen)


def relevance_of(row):
  text = row.x[row.text_after.start :]
  relevance = np.array([np.mean([cosine(v, t) for t in text]) for v in row.x[row.image]])
  return (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())


def cdpruner(row, keep):
  tokens, relevance = row.x[row.image], relevance_of(row)
  numbers = range(len(tokens))
  kernel = np.array([[relevance[i] * cosine(tokens[i], tokens[j]) * relevance[j] for j in numbers] for i in numbers])
  chosen = []
  while len(chosen) < keep:  # the token that makes the determinant of the chosen block largest
    gains = {i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1] for i in numbers if i not in chosen}
    chosen.append(max(gains, key=gains.get))
  return sorted(chosen)


def scope(row, keep):
  numbers = range(len(row.image))
  covered, chosen = [0.0] * len(row.image), []
  while len(chosen) < keep:

    def gain(v, covered=covered):
      return row.class_attention[v] * sum(
        max(0, cosine(row.features[u], row.features[v]) - covered[u]) for u in numbers
      )

    best = max((v for v in numbers if v not in chosen), key=gain)
    covered = [max(covered[u], cosine(row.features[u], row.features[best])) for u in numbers]
    chosen.append(best)
  return sorted(chosen)


def fsr(row, keep):
  numbers, attention = range(len(row.image)), row.class_attention
  priority = relevance_of(row) ** 3 * (attention - attention.min()) / (attention.max() - attention.min())
  order = sorted(numbers, key=lambda i: -priority[i])
  focus = order[: next(k for k in numbers if priority[order[:k]].sum() >= 0.9 * priority.sum())][:keep]
  chosen = list(focus)
  while len(chosen) < keep:
    reach = {i: min(1 - cosine(row.features[i], row.features[j]) for j in chosen) for i in numbers if i not in chosen}
    chosen.append(max(reach, key=reach.get))
  scanned, dropped = chosen[len(focus) :], [i for i in numbers if i not in chosen]

  def likeness(i, j):
    return cosine(row.features[i], row.features[j])

  anchor = {i: max(scanned, key=lambda j: likeness(i, j)) for i in dropped if scanned}
  alike = sorted(anchor, key=lambda i: -likeness(i, anchor[i]))[: len(scanned)]
  refined, weight = row.features.copy(), priority.copy()
  for i in alike:
    j = anchor[i]
    refined[j] = (weight[j] * refined[j] + priority[i] * row.features[i]) / (weight[j] + priority[i])
    weight[j] += priority[i]
  return sorted(chosen), np.tanh(refined[sorted(chosen)] @ row.projector)


def visiontrim(row, keep):
  numbers, features, text = range(len(row.image)), row.features, row.x[row.text_after.start :]

  def likeness(tokens):  # to each text token
    return np.array([[token @ t / math.sqrt(len(t)) for t in text] for token in tokens])

  def distances(vectors):  # to all tokens of its tile in the 3 × 3 around each token
    found = []
    for i in numbers:
      tile, y, x = row.grid[i]
      window = [j for j in numbers if row.grid[j, 0] == tile and abs(row.grid[j, 1:] - [y, x]).max() <= 1]
      found.append([np.linalg.norm(vectors[i] - vectors[j]) for j in window])
    return found

  pairs = list(zip(distances(features), distances(row.grid[:, 1:]), strict=True))
  deviations = [np.std(np.concatenate([pair[k] for pair in pairs])) for k in range(2)]
  kernels = [[-((np.array(d) / s) ** 2) for d, s in zip(pair, deviations, strict=True)] for pair in pairs]
  by_window = softmax(np.array([np.mean(by_feature + 0.5 * by_place) for by_feature, by_place in kernels]))
  by_class = softmax(row.class_attention)
  alpha = by_window.var() / (by_class.var() + by_window.var())
  num_merged = round(keep / 4)
  dominant = top(alpha * by_class + (1 - alpha) * by_window, keep - num_merged)
  dropped = [i for i in numbers if i not in dominant]
  tokens = row.x[row.image]
  resemblance = np.mean([softmax(column) for column in likeness(tokens[dropped]).T], axis=0)
  centres = [dropped[i] for i in top(resemblance, num_merged)]
  others, merged = [i for i in dropped if i not in centres], features.copy()
  for _ in range(3):
    own = {c: softmax(likeness([np.tanh(merged[c] @ row.projector)])[0]) for c in centres}
    product = {i: {c: softmax(likeness(tokens[[i]])[0]) @ own[c] for c in centres} for i in others}
    for c in centres:
      members = [i for i in others if max(product[i], key=product[i].get) == c]
      if members:
        merged[c] += np.average(features[members], axis=0, weights=[product[i][c] for i in members])
  kept = sorted(dominant + centres)
  return kept, np.tanh(merged[kept] @ row.projector)


def uniform(row, keep):
  count = len(row.image)
  side = math.isqrt(count)
  if count < row.most_image or row.grid.tolist() != [[0, i // side, i % side] for i in range(count)]:
    return [math.floor((i + 0.5) * count / keep) for i in range(keep)]
  num_rows = max(math.ceil(keep / side), round(keep**0.5))
  kept = []
  for number in range(num_rows):
    count = (number + 1) * keep // num_rows - number * keep // num_rows
    grid_row = math.floor((number + 0.5) * side / num_rows)
    kept += [grid_row * side + math.floor((i + 0.5) * side / count) for i in range(count)]
  return kept
