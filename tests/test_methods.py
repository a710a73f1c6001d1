"""Every pruning method against a slow version for one sequence, in NumPy and plain loops, written from its description.

The views that methods see are made of random numbers: rows of different lengths, the image at different places, grouped
query heads. Properties that all methods share are tested through the model.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from himap_jax.decoder import Projections
from himap_jax.layout import Layout
from himap_jax.method import View
from himap_jax.methods import METHODS, build_schedule
from himap_jax.methods import uniform as uniform_module
from himap_jax.vision import TowerOutput

B, N, SLOTS, HEADS, KEY_HEADS, H, D, F, TOWER_HEADS = 3, 36, 52, 4, 2, 8, 24, 20, 3
LENGTHS = (52, 45, 41)
STARTS = (5, 0, 4)
LAYER = 3


def draw(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def row_arrays():
  rng = np.random.default_rng(0)
  return {
    "x": draw(rng, B, SLOTS, D),
    "embeddings": 0.3 * draw(rng, B, SLOTS, D),
    "query": draw(rng, B, SLOTS, HEADS, H),
    "key": draw(rng, B, SLOTS, KEY_HEADS, H),
    "next_query": draw(rng, B, SLOTS, HEADS, H),
    "next_key": draw(rng, B, SLOTS, KEY_HEADS, H),
    "features": draw(rng, B, N, F),
    "class_attention": rng.dirichlet(np.ones(N) * 0.3, size=B).astype(np.float32),
    "tower_keys": draw(rng, B, N, TOWER_HEADS, H),
    "projector": draw(rng, F, D),
  }


@functools.partial(jax.jit, static_argnames=("name", "stage", "keep", "layer"))
def select(arrays, keys, *, name, stage, keep, layer=LAYER):
  """What a stage of a method selects."""
  layout = Layout(jnp.array(LENGTHS), jnp.array(STARTS), N)
  view = View(
    layer=layer,
    x=arrays["x"],
    layout=layout,
    original=jnp.tile(jnp.arange(N), (B, 1)),
    projections=Projections(arrays["query"], arrays["key"], arrays["key"]),
    next_projections=lambda slots: Projections(
      jnp.take_along_axis(arrays["next_query"], slots[:, :, None, None], axis=1),
      arrays["next_key"],
      arrays["next_key"],
    ),
    embeddings=arrays["embeddings"],
    embedded_layout=layout,
    tower=TowerOutput(arrays["features"], arrays["class_attention"], arrays["tower_keys"]),
    project=lambda features: jnp.tanh(features @ arrays["projector"]),
    keys=keys,
  )
  return METHODS[name].criteria[stage].select(view, keep)


@pytest.fixture(scope="module")
def keys():
  return jax.random.split(jax.random.key(1), B)


@dataclasses.dataclass
class Row:
  """One sequence without padding."""

  arrays: dict
  image: range
  text_after: range

  def __getattr__(self, name):
    return self.arrays[name]


@pytest.fixture(params=range(B))
def row(request, row_arrays):
  index = request.param
  length, start = LENGTHS[index], STARTS[index]
  arrays = {
    name: value if name == "projector" else value[index, :length].astype(np.float64)
    for name, value in row_arrays.items()
  }
  return index, Row(arrays, range(start, start + N), range(start + N, length))


def softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()


def attention_of(query, key, row):
  """Probabilities `[head, position]` of one causal query row."""
  maps = []
  for head in range(HEADS):
    keys = key[: row + 1, head // (HEADS // KEY_HEADS)]
    maps.append(softmax(keys @ query[row, head] / math.sqrt(H)))
  return np.array(maps)


def mean_attention(query, key, rows, image):
  """For each image token, the sum over rows of the attention averaged over heads."""
  scores = np.zeros(N)
  for row in rows:
    maps = attention_of(query, key, row).mean(axis=0)
    for index, position in enumerate(image):
      if position <= row:
        scores[index] += maps[position]
  return scores


def top(scores, keep):
  return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def cosine(a, b):
  return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


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
    shares += softmax(np.array([row.embeddings[position] @ row.embeddings[text] for text in row.text_after])) / N
  raters = [text for text, share in zip(row.text_after, shares, strict=True) if share > shares.mean()]
  assert len(raters) < len(row.text_after)
  return top(mean_attention(row.query, row.key, raters or row.text_after, row.image), keep)


def dart(row, keep):
  norms = np.abs(row.key).sum(axis=(1, 2))

  def by_norm(positions):
    return sorted(positions, key=lambda p: -norms[p])

  image_pivots, text_pivots = by_norm(row.image)[:4], by_norm(row.text_after)[:4]
  text_pivots += text_pivots[:1] * (min(4, SLOTS - N) - len(text_pivots))
  pivots, retained = image_pivots + text_pivots, set(image_pivots)
  for number, pivot in enumerate(pivots):
    count = (keep - 4) // len(pivots) + (number < (keep - 4) % len(pivots))
    rest = [p for p in row.image if p not in retained]
    rest.sort(key=lambda p: cosine(row.x[pivot], row.x[p]))
    retained |= set(rest[:count])
  return sorted(p - row.image[0] for p in retained)


def fitprune(row, keep):
  def received(rows):
    total = np.zeros(N)
    for r in rows:
      maps = attention_of(row.query, row.key, r).max(axis=0)
      total += [maps[p] if p <= r else 0 for p in row.image]
    return total

  return top(received(row.image) * received(row.text_after), keep)


def fastervlm(row, keep):
  return top(row.class_attention, keep)


def vispruner(row, keep):
  order = sorted(range(N), key=lambda i: -row.class_attention[i])
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
  rest = [i for i in range(N) if i not in dominant]
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
  rest = [i for i in range(N) if i not in outliers]
  num_samples = keep - len(outliers)
  kept = sorted(outliers + [rest[j * len(rest) // num_samples] for j in range(num_samples)])
  keys = row.tower_keys.reshape(N, -1)
  merged = []
  for i in kept:
    others = sorted((j for j in range(N) if j != i), key=lambda j: -cosine(keys[i], keys[j]))[:32]
    merged.append(row.features[i] + sum(row.class_attention[j] * row.features[j] for j in others))
  return kept, np.tanh(np.array(merged) @ row.projector)


def divprune(row, keep):
  tokens = row.x[row.image.start : row.image.stop]
  distance = [[1 - cosine(a, b) for b in tokens] for a in tokens]
  chosen = []
  while len(chosen) < keep:
    best, best_reach = None, -math.inf
    for i in range(N):
      if i not in chosen:
        reach = min(distance[i][j] for j in (chosen or range(N)) if j != i)
        if reach > best_reach:
          best, best_reach = i, reach
    chosen.append(best)
  return sorted(chosen)


def cdpruner(row, keep):
  tokens, text = row.x[row.image.start : row.image.stop], row.x[row.text_after.start :]
  relevance = np.array([np.mean([cosine(v, t) for t in text]) for v in tokens])
  relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
  kernel = np.array([[relevance[i] * cosine(tokens[i], tokens[j]) * relevance[j] for j in range(N)] for i in range(N)])
  chosen = []
  while len(chosen) < keep:  # the token that makes the determinant of the chosen block largest
    gains = {i: np.linalg.slogdet(kernel[np.ix_([*chosen, i], [*chosen, i])])[1] for i in range(N) if i not in chosen}
    chosen.append(max(gains, key=gains.get))
  return sorted(chosen)


def uniform(row, keep):
  side = math.isqrt(N)
  num_rows = max(math.ceil(keep / side), round(keep**0.5))
  kept = []
  for number in range(num_rows):
    count = (number + 1) * keep // num_rows - number * keep // num_rows
    grid_row = math.floor((number + 0.5) * side / num_rows)
    kept += [grid_row * side + math.floor((i + 0.5) * side / count) for i in range(count)]
  return kept


SLOW = {
  "himap": (himap_1, himap_2),
  "himap_swapped": (himap_2, himap_1),
  "instruction_attention": (himap_1,),
  "image_attention": (himap_2,),
  "fastv": (fastv,),
  "pyramiddrop": (pyramiddrop,),
  "sparsevlm": (sparsevlm,),
  "dart": (dart,),
  "fitprune": (fitprune,),
  "fastervlm": (fastervlm,),
  "visionzip": (visionzip,),
  "vispruner": (vispruner,),
  "divprune": (divprune,),
  "cdpruner": (cdpruner,),
  "prumerge": (prumerge,),
  "uniform": (uniform,),
}


def test_every_method_has_a_slow_version():
  assert set(SLOW) == {name for name, method in METHODS.items() if method.criteria} - {"random"}


STAGES = [(name, stage) for name in METHODS for stage in range(len(METHODS[name].criteria))]


@pytest.mark.parametrize("keep", [18, 13])
@pytest.mark.parametrize("name, stage", [stage for stage in STAGES if stage[0] in SLOW])
def test_selection_is_the_slow_version(name, stage, keep, row, row_arrays, keys):
  index, sequence = row
  expected = SLOW[name][stage](sequence, keep)
  selection = select(row_arrays, keys, name=name, stage=stage, keep=keep)
  expected_tokens = None
  if isinstance(expected, tuple):
    expected, expected_tokens = expected
  assert selection.kept[index].tolist() == expected
  assert (selection.merged is None) == (expected_tokens is None)
  if expected_tokens is not None:
    np.testing.assert_allclose(selection.merged[index], expected_tokens, atol=1e-4)


@pytest.mark.parametrize("name, stage", STAGES)
@pytest.mark.parametrize("keep", [1, 33, N])
def test_selection_keeps_exactly_the_count_in_order(name, stage, keep, row_arrays, keys):
  kept = np.asarray(select(row_arrays, keys, name=name, stage=stage, keep=keep).kept)
  assert kept.shape == (B, keep)
  assert (np.diff(kept, axis=1) > 0).all()
  assert kept.min() >= 0
  assert kept.max() < N


@pytest.mark.parametrize("name, stage", STAGES)
def test_padding_and_batch_mates_do_not_matter(name, stage, row_arrays, keys):
  """Other values in padding and in the other rows leave a row's selection as it is."""
  padding = (np.arange(SLOTS) >= np.array(LENGTHS)[:, None]) | (np.arange(B) != 1)[:, None]
  other = {}
  for array_name, value in row_arrays.items():
    if value.shape[:2] == (B, SLOTS):
      value = np.where(padding.reshape(B, SLOTS, *[1] * (value.ndim - 2)), 7.5 * value[:, ::-1] + 3, value)
    elif value.shape[0] == B:
      value = value * np.array([3.0, 1.0, 0.2], np.float32).reshape(B, *[1] * (value.ndim - 1))
    other[array_name] = value.astype(np.float32)
  expected, actual = (select(arrays, keys, name=name, stage=stage, keep=13) for arrays in (row_arrays, other))
  np.testing.assert_array_equal(actual.kept[1], expected.kept[1])
  if expected.merged is not None:
    np.testing.assert_allclose(actual.merged[1], expected.merged[1], atol=1e-6)


def test_random_depends_on_the_row_key_and_the_layer(row_arrays, keys):
  draw_kept = functools.partial(select, row_arrays, name="random", stage=0, keep=13)
  kept = np.asarray(draw_kept(keys=keys).kept)
  assert (kept[0] != kept[1]).any()
  assert (np.asarray(draw_kept(keys=keys, layer=5).kept) != kept).any()
  np.testing.assert_array_equal(draw_kept(keys=keys[::-1]).kept, kept[::-1])


@pytest.mark.parametrize("keep", [576, 400, 288, 144, 72, 64, 25, 2, 1])
def test_uniform_spreads_over_the_picture(keep):
  kept = uniform_module.grid(24, keep)
  assert len(set(kept.tolist())) == keep
  if keep >= 4:
    rows, columns = np.divmod(kept, 24)
    for coordinate in (rows, columns):
      assert abs(coordinate.mean() - 11.5) < 1.5
      assert coordinate.max() - coordinate.min() >= 11


def schedule(method, **settings):
  return build_schedule(method, **{"num_layers": 32, "num_image_tokens": 576, **settings})


@pytest.mark.parametrize(
  "method, stages",
  [
    ("none", []),
    ("himap", [(2, 288), (8, 72)]),
    ("himap_swapped", [(2, 288), (8, 72)]),
    ("instruction_attention", [(2, 288)]),
    ("image_attention", [(8, 144)]),
    ("fastv", [(2, 288)]),
    ("pyramiddrop", [(8, 288), (16, 144), (24, 72)]),
    ("sparsevlm", [(2, 300), (6, 200), (15, 110)]),
    ("dart", [(2, 128)]),
    ("fastervlm", [(0, 144)]),
    ("visionzip", [(0, 64)]),
    ("vispruner", [(0, 128)]),
    ("divprune", [(0, 56)]),
    ("cdpruner", [(0, 64)]),
    ("prumerge", [(0, 144)]),
    ("random", [(0, 144)]),
    ("uniform", [(0, 144)]),
    ("divprune+himap", [(0, 56), (2, 28), (8, 7)]),
    ("random+himap", [(0, 144), (2, 72), (8, 18)]),
  ],
)
def test_default_schedules(method, stages):
  assert [(stage.layer, stage.keep) for stage in schedule(method).stages] == stages


def test_default_schedule_of_fitprune():
  stages = schedule("fitprune").stages
  assert (stages[0].layer, stages[0].keep) == (1, 562)
  assert (stages[1].layer, stages[1].keep) == (2, 529)
  assert (stages[-1].layer, stages[-1].keep) == (29, 127)
  shallower = schedule("fitprune", num_layers=30).stages
  assert shallower[-1].keep == 127
  assert [stage.layer for stage in shallower] == sorted({stage.layer for stage in shallower})


def test_default_schedule_of_shortv():
  assert len(schedule("shortv").frozen_layers) == 19
  assert len(schedule("shortv", num_layers=40).frozen_layers) == 24
  assert schedule("shortv", num_layers=30, prune_layers=(29, 3)).frozen_layers == (3, 29)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(method="fasttv"), "unknown method 'fasttv'; known: "),
    (dict(method="visionzip", has_class_token=False), "tower has none; methods that work: .*divprune"),
    (dict(method="fastervlm+himap", has_class_token=False), "tower has none"),
    (dict(method="himap+divprune"), "two methods combine"),
    (dict(method="random+fastervlm"), "two methods combine"),
    (dict(method="divprune+shortv"), "two methods combine"),
    (dict(method="divprune+himap+fastv"), "two methods combine"),
    (dict(method="divprune", prune_layers=(2,)), "acts before the decoder"),
    (dict(method="fastv", prune_layers=(0,)), "needs the attention of the layer before"),
    (dict(method="divprune+fastv", prune_layers=(0, 0)), "needs the attention of the layer before"),
    (dict(method="pyramiddrop", prune_layers=(8, 16)), "has 2 stages, but keep has 3 values"),
    (dict(method="shortv", num_layers=30), "has tables for decoders of 32 and 40 layers"),
    (dict(method="shortv", keep=(0.5,)), "keeps every image token"),
    (dict(method="shortv", prune_layers=(3, 32)), "cannot freeze layer 32"),
    (dict(method="shortv", prune_layers=(3, 3)), "named twice"),
  ],
)
def test_schedules_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    schedule(**settings)
