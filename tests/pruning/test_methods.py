"""Every pruning method against a slow version for one sequence, in NumPy and plain loops, written from its description.

The slow versions are in `tests/slow_before.py` and `tests/slow_inside.py`; they take a `Row` and return what they keep.
The views that methods see are made of random numbers: rows of different lengths, the image at different places, grouped
query heads. Properties that all methods share are tested through the model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_before as before
import slow_inside as inside

from himap_jax.inputs import IMAGE, PADDING, TEXT, Layout
from himap_jax.pruning.method import View
from himap_jax.pruning.methods import METHODS, controls

B, N, SLOTS, HEADS, KEY_HEADS, H, D, F, TOWER_HEADS = 3, 36, 52, 4, 2, 8, 24, 20, 3
LENGTHS = (52, 45, 41)
STARTS = (5, 0, 4)
LAYER = 3
# One tile of 6 × 6 features.
SQUARE = np.stack(np.indices((1, 6, 6), np.int32), axis=-1).reshape(N, 3)
# Two tiles of 3 × 6 features.
GRID = np.stack(np.indices((2, 3, 6), np.int32), axis=-1).reshape(N, 3)


def layout_of(images, lengths):
  """The layout of rows: the image slots of each, and its length."""
  slot = np.arange(SLOTS)
  rows = [
    np.where(slot >= length, PADDING, np.where(np.isin(slot, image), IMAGE, TEXT))
    for image, length in zip(images, lengths, strict=True)
  ]
  layout = Layout.of_rows(np.array(rows), np.zeros((len(rows), SLOTS), int), max(map(len, images)))
  return jax.tree.map(jnp.asarray, layout)


ONE_RUN = layout_of([range(start, start + N) for start in STARTS], LENGTHS)


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
    "value": draw(rng, B, SLOTS, KEY_HEADS, H),
    "next_query": draw(rng, B, SLOTS, HEADS, H),
    "next_key": draw(rng, B, SLOTS, KEY_HEADS, H),
    "features": draw(rng, B, N, F),
    "class_attention": rng.dirichlet(np.ones(N) * 0.3, size=B).astype(np.float32),
    "tower_keys": draw(rng, B, N, TOWER_HEADS, H),
    "grid": np.stack([SQUARE, *(rng.permutation(GRID) for _ in range(B - 1))]),
    "projector": draw(rng, F, D),
  }


@functools.partial(jax.jit, static_argnames=("name", "stage", "keep", "layer"))
def select_in(layout, arrays, keys, *, name, stage, keep, layer=LAYER):
  """What a stage of a method selects."""
  view = View(
    layer=layer,
    x=arrays["x"],
    layout=layout,
    query=arrays["query"],
    key=arrays["key"],
    value=arrays["value"],
    next_layer=lambda slots: (
      jnp.take_along_axis(arrays["next_query"], slots[:, :, None, None], axis=1),
      arrays["next_key"],
    ),
    scale=H**-0.5,
    embeddings=arrays["embeddings"],
    embedded_layout=layout,
    features=arrays["features"],
    class_attention=arrays["class_attention"],
    tower_keys=arrays["tower_keys"],
    grid=arrays["grid"],
    project=lambda features: jnp.tanh(features @ arrays["projector"]),
    keys=keys,
    parameters={"threshold": jnp.float32(0.7)},
  )
  return METHODS[name].criteria[stage].select(view, keep)


select = functools.partial(select_in, ONE_RUN)


@pytest.fixture(scope="module")
def keys():
  return jax.random.split(jax.random.key(1), B)


@dataclasses.dataclass
class Row:
  """One sequence without padding.

  Attributes:
    image: slots of its image tokens.
    text_after: slots of the text after the last of these.
    most_image, most_text: image tokens, and other slots, of the longest row in its batch.
  """

  arrays: dict
  image: list[int]
  text_after: range
  most_image: int = N
  most_text: int = SLOTS - N

  def __getattr__(self, name):
    return self.arrays[name]


OF_IMAGE_TOKENS = ("features", "class_attention", "tower_keys", "grid")


def row_of(row_arrays, index, image, length):
  """A row of the batch alone."""
  arrays = {name: value[index, :length] for name, value in row_arrays.items() if name != "projector"}
  arrays |= {name: row_arrays[name][index, : len(image)] for name in OF_IMAGE_TOKENS}
  arrays = {name: value.astype(np.float64) for name, value in arrays.items()} | {"projector": row_arrays["projector"]}
  return Row(arrays, list(image), range(max(image) + 1, length))


@pytest.fixture(params=range(B))
def row(request, row_arrays):
  index = request.param
  start = STARTS[index]
  return index, row_of(row_arrays, index, range(start, start + N), LENGTHS[index])


SLOW = {
  "himap_adaptive": (inside.adaptive(0), inside.adaptive(1)),
  "himap": (inside.himap_1, inside.himap_2),
  "himap_swapped": (inside.himap_2, inside.himap_1),
  "instruction_attention": (inside.himap_1,),
  "image_attention": (inside.himap_2,),
  "fastv": (inside.fastv,),
  "pyramiddrop": (inside.pyramiddrop,),
  "sparsevlm": (inside.sparsevlm,),
  "dart": (inside.dart,),
  "fitprune": (inside.fitprune,),
  "visipruner": (inside.visipruner,),
  "fastervlm": (before.fastervlm,),
  "visionzip": (before.visionzip,),
  "vispruner": (before.vispruner,),
  "divprune": (before.divprune,),
  "cdpruner": (before.cdpruner,),
  "prumerge": (before.prumerge,),
  "scope": (before.scope,),
  "fsr": (before.fsr,),
  "visiontrim": (before.visiontrim,),
  "uniform": (before.uniform,),
}


def test_every_method_has_a_slow_version():
  assert set(SLOW) == {name for name, method in METHODS.items() if method.criteria} - {"random"}


STAGES = [(name, stage) for name in METHODS for stage in range(len(METHODS[name].criteria))]


def kept_of(selection, row):
  kept = selection.kept[row]
  return (kept if selection.present is None else kept[selection.present[row]]).tolist()


def assert_row(selection, row, expected):
  """`expected` is what a slow version returns: the kept tokens, and what they become if the method merges others."""
  expected, merged = expected if isinstance(expected, tuple) else (expected, None)
  assert kept_of(selection, row) == expected
  assert (selection.merged is None) == (merged is None)
  if merged is not None:
    np.testing.assert_allclose(selection.merged[row], merged, atol=1e-4)


@pytest.mark.parametrize("keep", [18, 13])
@pytest.mark.parametrize("name, stage", [stage for stage in STAGES if stage[0] in SLOW])
def test_selection_is_the_slow_version(name, stage, keep, row, row_arrays, keys):
  index, sequence = row
  selection = select(row_arrays, keys, name=name, stage=stage, keep=keep)
  assert_row(selection, index, SLOW[name][stage](sequence, keep))


@pytest.mark.parametrize("name, stage", [stage for stage in STAGES if stage[0] in SLOW])
def test_order_is_that_in_which_the_slow_version_would_keep_more(name, stage, row, row_arrays, keys):
  index, sequence = row
  selection, ranks = select(row_arrays, keys, name=name, stage=stage, keep=18), METHODS[name].criteria[stage].rank
  assert (selection.order is None) == (ranks is None and name != "himap_adaptive")
  if selection.order is not None:
    kept, order = np.asarray(selection.kept[index]), np.asarray(selection.order[index])
    slow = SLOW["himap" if name == "himap_adaptive" else name][stage]
    for count in (1, 4, 18):
      assert kept[order < count].tolist() == slow(sequence, count)


@pytest.mark.sampled
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
    other[array_name] = value.astype(row_arrays[array_name].dtype)
  expected, actual = (select(arrays, keys, name=name, stage=stage, keep=13) for arrays in (row_arrays, other))
  assert kept_of(actual, 1) == kept_of(expected, 1)
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
  kept = controls.grid(24, keep)
  assert len(set(kept.tolist())) == keep
  if keep >= 4:
    rows, columns = np.divmod(kept, 24)
    for coordinate in (rows, columns):
      assert abs(coordinate.mean() - 11.5) < 1.5
      assert coordinate.max() - coordinate.min() >= 11


# Image tokens in two runs with text between them, in as many as a whole image has and in fewer.
RUNS = ([*range(3, 21), *range(25, 43)], [*range(2, 12), *range(20, 36)], [*range(5), *range(6, 30)])
RUN_LENGTHS = (52, 44, 35)


# Stages whose choice for a row that lacks tokens is not that for the row alone: VisPruner has as many rounds for all,
# and the number of tokens says which rung an adaptive row is on.
TIED = {("vispruner", 0), ("himap_adaptive", 1)}
ALONE = [
  (*stage, row)
  for stage in STAGES
  for row in range(B)
  if stage[0] in SLOW and not (stage in TIED and len(RUNS[row]) < N)
]


@pytest.mark.parametrize("keep", [18, 13])
@pytest.mark.parametrize("name, stage, index", ALONE)
def test_rows_of_two_runs_and_other_counts_choose_as_they_do_alone(name, stage, index, keep, row_arrays, keys):
  selection = select_in(layout_of(RUNS, RUN_LENGTHS), row_arrays, keys, name=name, stage=stage, keep=keep)
  assert_row(selection, index, SLOW[name][stage](row_of(row_arrays, index, RUNS[index], RUN_LENGTHS[index]), keep))


@pytest.mark.sampled
@pytest.mark.parametrize("name, stage", STAGES)
@pytest.mark.parametrize("keep", [1, 13, 30, N])
def test_tokens_that_a_row_lacks_are_kept_last(name, stage, keep, row_arrays, keys):
  layout = layout_of(RUNS, RUN_LENGTHS)
  selection = select_in(layout, row_arrays, keys, name=name, stage=stage, keep=keep)
  kept = np.asarray(selection.kept)
  assert kept.shape == (B, keep)
  assert (np.diff(kept, axis=1) > 0).all()
  assert kept.min() >= 0 and kept.max() < N
  for row, image in enumerate(RUNS):
    own = kept_of(selection, row)
    assert sum(number < len(image) for number in kept[row]) == min(keep, len(image))
    if selection.present is not None:
      assert max(own) < len(image)


def test_padding_and_other_rows_do_not_matter_where_counts_differ(row_arrays, keys):
  """What stands in padding and in the places of tokens that a row lacks leaves its selection as it is."""
  layout, lengths = layout_of(RUNS, RUN_LENGTHS), np.array(RUN_LENGTHS)
  other = dict(row_arrays)
  for name, value in row_arrays.items():
    if value.shape[:2] in ((B, SLOTS), (B, N)):
      end = lengths if value.shape[1] == SLOTS else np.array([len(image) for image in RUNS])
      unused = (np.arange(value.shape[1]) >= end[:, None]).reshape(*value.shape[:2], *[1] * (value.ndim - 2))
      other[name] = np.where(unused, 7.5 * value[:, ::-1] + 3, value).astype(value.dtype)
  for name, stage in STAGES:
    expected, actual = (select_in(layout, a, keys, name=name, stage=stage, keep=13) for a in (row_arrays, other))
    for row in range(B):
      assert kept_of(actual, row) == kept_of(expected, row), name
    if expected.merged is not None:
      np.testing.assert_allclose(actual.merged, expected.merged, atol=1e-6)
