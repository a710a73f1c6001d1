"""Parts of the slow pruning methods."""

import numpy as np


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def top(scores, keep):
  return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def cosine(a, b):
  return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
